// Is it one speaker? An exported model of a fixed length and ONNX Runtime, in C++17.
//
//   mrl-redimnet export MODEL --to onnx --out model.onnx --seconds 3        # writes model_3s.onnx
//   g++ -std=c++17 -I ORT/include embed_with_onnxruntime.cpp -L ORT/lib -lonnxruntime -o embed
//   ./embed model_3s.onnx a.wav b.wav                                       # 16-bit mono WAV files at 16 kHz
//
// ORT is a release of https://github.com/microsoft/onnxruntime. Tried with g++, headers of 1.12, library 1.30.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>

// The samples of a WAV file with a plain header; shorter audio is repeated, of longer audio the middle is taken.
std::vector<float> read_wav(const std::string& path, size_t length) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  const uint16_t expected[] = {1, 1, 16000, 0, 32000, 0, 2, 16};  // integers, one channel, rate, bytes a second, 16 bits
  if (bytes.size() < 46 || std::memcmp(&bytes[20], expected, 16) || std::memcmp(&bytes[36], "data", 4))
    throw std::runtime_error(path + ": expected a 16-bit mono WAV file at 16 kHz with a header of 44 bytes.");
  std::vector<int16_t> samples((bytes.size() - 44) / 2);
  std::memcpy(samples.data(), &bytes[44], 2 * samples.size());
  const size_t skipped = samples.size() > length ? (samples.size() - length) / 2 : 0;
  std::vector<float> audio(length);
  for (size_t i = 0; i < length; i++) audio[i] = samples[(skipped + i) % samples.size()] / 32768.0f;
  return audio;
}

int main(int argc, char** argv) try {
  if (argc != 4) throw std::runtime_error("usage: embed model_3s.onnx a.wav b.wav");
  Ort::Env env;
  Ort::Session session(env, argv[1], Ort::SessionOptions{});
  std::vector<int64_t> shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
  if (shape[1] < 0) throw std::runtime_error("the model takes any length: export it with --seconds.");
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const char *input = "input_values", *output = "embeddings";  // ONNX Runtime asks for arrays of names
  std::vector<std::vector<float>> embeddings;
  for (int i : {2, 3}) {
    std::vector<float> audio = read_wav(argv[i], shape[1]);
    auto values = Ort::Value::CreateTensor<float>(memory, audio.data(), audio.size(), shape.data(), shape.size());
    auto answers = session.Run(Ort::RunOptions{}, &input, &values, 1, &output, 1);
    const float* numbers = answers[0].GetTensorData<float>();
    embeddings.emplace_back(numbers, numbers + answers[0].GetTensorTypeAndShapeInfo().GetElementCount());
  }
  double ab = 0, aa = 0, bb = 0;
  const auto &a = embeddings[0], &b = embeddings[1];
  for (size_t i = 0; i < a.size(); i++) ab += a[i] * b[i], aa += a[i] * a[i], bb += b[i] * b[i];
  std::printf("%zu dimensions: cosine %.4f\n", a.size(), ab / std::sqrt(aa * bb));
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
