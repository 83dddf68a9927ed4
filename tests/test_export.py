"""Exported files against the model they come from: real files, run by the runtimes they are for."""

import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
import torch
from commands import refusal, run
from conftest import TINY, VARIANTS, at_most, padded, relative_error, stages, tiny_config, tiny_model, waves
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from transformers import AutoModel

from configuration_mrl_redimnet import MRLReDimNetConfig
from modeling_mrl_redimnet import MRLReDimNetForXVector
from mrl_redimnet.adapters import AdapterBank, AdapterFacts, Base, WrongBaseError, fingerprint, lora_config
from mrl_redimnet.adapters.facts import adapter_digest
from mrl_redimnet.export import (
    adapter_base_number,
    deviation,
    export_facts,
    export_onnx,
    export_onnx_adapter,
    export_torch,
    graph_form,
)
from mrl_redimnet.saving import save_model
from mrl_redimnet.scoring.calibration import Calibration, Threshold, Thresholds

EXAMPLE = Path(__file__).parents[1] / "examples" / "embed_with_onnxruntime.py"
WINDOW = 16_000  # samples; of the model of the fixture
# Few layers: what takes time here is that torch traces every one of them.
SMALL = dict(TINY, base_channels=8, stages=stages((2, 1, 1, 4)))
EXPANDED = dict(TINY, stages=stages((2, 1, 2, 4)))
SMALLEST = dict(TINY, stages=stages((1, 1, 1, None)), pooling="TAP", group_divisor=None)


def answers(file: Path, batch: dict[str, torch.Tensor], adapter: Path | None = None) -> torch.Tensor:
    """What onnxruntime computes from an ONNX file, with an .onnx_adapter put on it for this call."""
    options, call = onnxruntime.SessionOptions(), onnxruntime.RunOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    if adapter is not None:
        loaded = onnxruntime.LoraAdapter()
        loaded.Load(str(adapter))
        call.add_active_adapter(loaded)
    feeds = {each.name: batch[each.name] for each in session.get_inputs()}
    feeds = {name: (value.long() if name == "attention_mask" else value).numpy() for name, value in feeds.items()}
    return torch.from_numpy(session.run(None, feeds, call)[0])


def expected(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return getattr(model, "redimnet", model)(**batch).embeddings


def facts_of(file: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(file).metadata_props}


def process(tmp_path: Path, code: list, blocked: tuple[str, ...]) -> subprocess.CompletedProcess:
    """Runs Python where importing what is `blocked` fails."""
    for name in blocked:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is out of reach')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, *map(str, code)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def model():
    """Of windows of a second, with a head."""
    return tiny_model(MRLReDimNetConfig(**SMALL, window_seconds=WINDOW / 16_000), kind=MRLReDimNetForXVector)


@pytest.fixture(scope="module")
def thresholds(model) -> Thresholds:
    """Of 8 and 16 dimensions; of an adapter; and of weights that were there before."""
    scores = np.linspace(-1, 1, 400)
    labels = (scores + np.sin(40 * scores) > 0).astype(int)
    entry = Threshold.fit(scores, labels, wanted=0.2, dim=8, weights=fingerprint(model), trials="all")
    # At the half second of the example its cosines have LLRs of -29: a threshold of -10 is not one of cosines.
    timed = Calibration(offset=0, slope=1, shorter=50, longer=0, seconds=(0.1, 9), steeper=0.1)
    found = Thresholds()
    for each in (
        replace(entry, threshold=-1.1),
        replace(entry, dim=16, threshold=-10.0, calibration=timed),
        replace(entry, dim=32, weights="sha256:0"),
        replace(entry, adapter="telephony", weights=f"{fingerprint(model)}+sha256:1"),
        replace(entry, scorer="as_norm", threshold=3.0),
    ):
        found.put(each)
    return found


@pytest.fixture(scope="module")
def folder(model, thresholds, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "small"
    save_model(model, folder)
    thresholds.save(folder)
    return folder


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory) -> Path:
    """The ONNX file that the command makes of it, with places for adapters."""
    file = tmp_path_factory.mktemp("onnx") / "small.onnx"
    assert run("export", folder, "--out", file, "--adapter-inputs", "linear") == 0
    return file


@pytest.fixture(scope="module")
def program(model, tmp_path_factory) -> Path:
    """The torch.export file of it."""
    return export_torch(model, tmp_path_factory.mktemp("torch") / "small.pt2")


def adapter_of(model, folder: Path, rank: int, seed: int, placement: str = "linear", **options) -> Path:
    """A PEFT adapter that changes much, with the facts that name its base."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = tiny_model(model.config, kind=MRLReDimNetForXVector).redimnet
        config = lora_config(placement, r=rank, model=encoder, init_lora_weights=False, **options)
        get_peft_model(encoder, config).save_pretrained(folder)
    AdapterFacts("telephony", Base("me/base", None, fingerprint(model))).save(folder)
    return folder


# ---------------------------------------------------------------- answers


@at_most(50)
@given(
    lengths=st.lists(st.integers(257, WINDOW), min_size=1, max_size=4),
    extra=st.integers(0, 500),
    garbage=st.sampled_from([0.0, 1.0, 1e3]),
)
def test_answers_are_the_models_at_every_length_and_padding(model, file, lengths, extra, garbage):
    utterances = waves(*lengths)
    found = answers(file, padded(utterances, min(extra, WINDOW - max(lengths)), garbage))
    for row, utterance in zip(found, utterances, strict=True):
        alone = expected(model, {"input_values": utterance[None]})[0]
        assert relative_error(row, alone) < 1e-4


def test_the_graph_has_no_transform_norm_or_loop_of_its_own(file):
    kinds = {node.op_type for node in onnx.load(file).graph.node}
    assert "Gelu" in kinds and not {"STFT", "DFT", "BatchNormalization", "Erf", "Loop", "If"} & kinds


def test_short_embeddings_are_the_first_numbers(model, file):
    batch = padded(waves(9000, 5000))
    found = answers(file, batch)
    for dim in model.config.matryoshka_dims:
        assert relative_error(found[:, :dim], expected(model, {**batch, "truncate_dim": dim})) < 1e-4


@pytest.mark.slow
def test_another_front_end_and_other_blocks_up_to_a_minute_in_a_lean_graph(tmp_path):
    changes = dict(front_end="tf_mel", normalize_signal=True, block_1d="fc", block_2d="basic_resnet_fwse")
    other = tiny_model(MRLReDimNetConfig(**EXPANDED, **changes, embedding_norm=True))
    file = export_onnx(other, tmp_path / "other.onnx")
    for lengths in ((400,), (960_000,), (30_000, 400, 20_000)):
        batch = padded(waves(*lengths), garbage=1.0)
        assert relative_error(answers(file, batch), expected(other, batch)) < 1e-4
    # No transform and no batch norm of its own, one node per GELU, and people can read the shapes.
    graph = onnx.load(file).graph
    kinds = [node.op_type for node in graph.node]
    assert not {"STFT", "DFT", "BatchNormalization", "Erf", "Loop", "If"} & set(kinds) and kinds.count("Gelu") == 2
    shapes = {
        each.name: [axis.dim_param or axis.dim_value for axis in each.type.tensor_type.shape.dim]
        for each in (*graph.input, *graph.output)
    }
    samples = ["batch", "samples"]
    assert shapes == {"input_values": samples, "attention_mask": samples, "embeddings": ["batch", 32]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_form_that_is_exported_answers_as_the_model_and_leaves_it_alone(variant):
    model = tiny_model(tiny_config(variant)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    form = graph_form(model)
    assert model.training and not form.training and "basis" not in dict(model.named_buffers())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    batch = padded(waves(6000, 4000), garbage=1.0)
    assert relative_error(expected(form, batch), expected(model.eval(), batch)) < 1e-5


def test_narrow_groups_become_blocks_of_sixteen():
    config = tiny_config(base_channels=16, group_divisor=4, num_mel_bins=8)
    groups = {name: part.groups for name, part in graph_form(tiny_model(config)).named_modules() if "blocks" in name
              and isinstance(part, torch.nn.Conv2d)}  # fmt: skip
    assert groups == {"trunk.stages.0.blocks.0.conv": 1, "trunk.stages.1.blocks.0.conv": 2}
    batch = padded(waves(6000, 4000))
    assert relative_error(expected(graph_form(tiny_model(config)), batch), expected(tiny_model(config), batch)) < 1e-5


# ---------------------------------------------------------------- fixed lengths


@pytest.mark.slow
def test_files_of_fixed_lengths_have_every_shape_and_answer_as_the_model(tmp_path):
    model = tiny_model(MRLReDimNetConfig(**SMALLEST))
    save_model(model, tmp_path / "small")
    options = ("--seconds", "0.5", "1", "--out", tmp_path / "small.onnx")
    assert run("export", tmp_path / "small", *options) == 0
    for name, samples in (("small_0.5s.onnx", 8_000), ("small_1s.onnx", 16_000)):
        graph = onnx.load(tmp_path / name).graph
        shapes = {
            each.name: [axis.dim_value for axis in each.type.tensor_type.shape.dim]
            for each in (*graph.input, *graph.output)
        }
        assert shapes == {"input_values": [1, samples], "embeddings": [1, 32]}
        assert {"Conv", "MatMul"} & {node.op_type for node in graph.node} and "Shape" not in str(graph.node)
        assert facts_of(tmp_path / name)["samples"] == str(samples)
        batch = {"input_values": waves(samples)[0][None]}
        assert relative_error(answers(tmp_path / name, batch), expected(model, batch)) < 1e-4


def test_programs_of_fixed_lengths_have_no_transform_and_answer_as_the_model(tmp_path):
    model = tiny_model(MRLReDimNetConfig(**SMALLEST))
    save_model(model, tmp_path / "small")
    options = ("--to", "torch", "--seconds", "0.5", "1", "--out", tmp_path / "small.pt2")
    assert run("export", tmp_path / "small", *options) == 0
    for name, samples in (("small_0.5s.pt2", 8_000), ("small_1s.pt2", 16_000)):
        extra = {"mrl_redimnet.json": ""}
        program = torch.export.load(tmp_path / name, extra_files=extra)
        assert json.loads(extra["mrl_redimnet.json"])["samples"] == str(samples)
        assert "stft" not in str(program.graph) and "fft" not in str(program.graph)
        assert not program.range_constraints and program.graph_signature.user_inputs == ("input_values",)
        batch = {"input_values": waves(samples)[0][None]}
        assert relative_error(program.module()(**batch), expected(model, batch)) < 1e-4


# ---------------------------------------------------------------- precisions


@pytest.mark.parametrize(
    ("precision", "bounds", "share"),
    [
        ("float16", (1e-5, 5e-3), 0.55),
        pytest.param("int8", (1e-3, 5e-2), 0.7, marks=pytest.mark.slow),
    ],
)
def test_other_precisions_are_smaller_and_near_with_the_front_end_in_float32(tmp_path, precision, bounds, share):
    dims = dict(base_channels=32, embedding_size=512, matryoshka_dims=[512])
    model = tiny_model(MRLReDimNetConfig(**{**SMALLEST, **dims}))
    file = export_onnx(model, tmp_path / f"{precision}.onnx", precision=precision, mask=False)
    assert bounds[0] < deviation(model, file) < bounds[1]
    graph = onnx.load(file).graph
    assert [each.name for each in graph.input] == ["input_values"]
    assert {each.type.tensor_type.elem_type for each in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    front_end = [constants.pop(f"window.encoder.front_end.{name}") for name in ("basis", "mel_filters")]
    assert {tensor.data_type for tensor in front_end} == {onnx.TensorProto.FLOAT}
    kinds = {tensor.data_type for name, tensor in constants.items() if name.endswith("_quantized")}
    # Signed ones overflow on processors with AVX2 alone, whose answers a test elsewhere cannot see.
    assert kinds == ({onnx.TensorProto.UINT8} if precision == "int8" else set())
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert sum(len(tensor.raw_data) for tensor in constants.values()) < share * weights
    kernels = [name for node in graph.node if node.op_type == "Conv" for name in node.input[1:]]
    assert len(kernels) >= 5 and {*kernels} - {front_end[0].name} <= constants.keys()  # with the norms in them


@pytest.mark.slow
def test_numbers_too_large_for_a_precision_leave_no_file(tmp_path):
    model = tiny_model(MRLReDimNetConfig(**SMALLEST))
    model.trunk.stem.norm.weight.data *= 1e6
    with pytest.raises(ValueError, match="precision float16: .* is not written"):
        export_onnx(model, tmp_path / "model.onnx", precision="float16")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- transformers' exporter


@pytest.mark.slow
def test_transformers_exporter_writes_a_file_that_answers_as_the_model(model, folder, tmp_path):
    """By the lines of the page."""
    pytest.importorskip("transformers.exporters", reason="this transformers has no exporters yet")
    page = (EXAMPLE.parents[1] / "docs" / "export.md").read_text().split("## transformers' exporter\n")[1]
    (code,) = re.findall(r"^```py\n(.*?)^```", page.split("\n## ")[0], flags=re.DOTALL | re.MULTILINE)
    exec(code, {"AutoModel": AutoModel, "torch": torch, "REPO": str(folder), "OUT": str(tmp_path / "out")})
    for lengths in ((9_000, 5_000, 257), (16_000,)):
        batch = padded(waves(*lengths), garbage=1.0)
        assert relative_error(answers(tmp_path / "out" / "model.onnx", batch), expected(model, batch)) < 1e-4
    assert "STFT" in {node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}


# ---------------------------------------------------------------- ReDimNet2


@pytest.fixture(scope="module")
def strided():
    """A ReDimNet2 whose last map has a fourth of the frames, with all that one can have."""
    changes = dict(VARIANTS["redimnet2_normed"], dual_maps=True)
    changes["stages"] = stages(((2, 2), 1, 0.5, 4), ((1, 2), 1, 1, None))
    return tiny_model(tiny_config(**changes))


@pytest.fixture(scope="module")
def strided_file(strided, tmp_path_factory) -> Path:
    return export_onnx(strided, tmp_path_factory.mktemp("onnx") / "strided.onnx", adapter_inputs="linear")


@pytest.mark.parametrize("samples", [480, 8_159, 8_160, 8_480, 50_001])  # a whole last frame, and up to three to spare
@pytest.mark.slow
def test_strides_over_time_at_any_length_and_padding(strided, strided_file, samples):
    batch = padded(waves(samples, 480), garbage=1.0)
    assert relative_error(answers(strided_file, batch), expected(strided, batch)) < 1e-4


@pytest.mark.slow
def test_adapters_are_put_on_a_network_with_strides_over_time(strided, strided_file, tmp_path):
    source = adapter_of(strided, tmp_path / "adapter", 2, seed=0)
    packed = export_onnx_adapter(strided, tmp_path / "a.onnx_adapter", adapter=source)
    batch = padded(waves(9000, 5000))
    with torch.inference_mode():
        wanted = PeftModel.from_pretrained(tiny_model(strided.config), source).eval()(**batch).embeddings
    assert relative_error(wanted, expected(strided, batch)) > 0.05
    assert relative_error(answers(strided_file, batch, packed), wanted) < 1e-5


@pytest.mark.slow
def test_a_network_with_strides_over_time_in_int8_and_without_mask(strided, tmp_path):
    file = export_onnx(strided, tmp_path / "int8.onnx", precision="int8", mask=False)
    batch = {"input_values": torch.stack(waves(8_160, 8_160))}
    assert 1e-6 < relative_error(answers(file, batch), expected(strided, batch)) < 0.1


@pytest.mark.slow
def test_a_torch_program_of_a_network_with_strides_over_time_says_from_what_length_on(strided, tmp_path):
    file = export_torch(strided, tmp_path / "strided.pt2", facts={"min_samples": str(strided.config.min_samples)})
    extra = {"mrl_redimnet.json": ""}
    program = torch.export.load(file, extra_files=extra).module()
    least = int(json.loads(extra["mrl_redimnet.json"])["min_samples"])
    assert least == strided.config.min_samples + 4 * 160
    for samples in (least, 8_159, 8_160, 8_480):
        batch = padded(waves(samples, strided.config.min_samples), garbage=1.0)
        assert relative_error(program(**batch), expected(strided, batch)) < 1e-5
    with pytest.raises(AssertionError, match=f"input_values.* >= {least}"):
        program(**padded(waves(least - 1, least - 1)))


# ---------------------------------------------------------------- adapters


def test_adapters_of_any_rank_are_put_on_call_by_call(model, file, tmp_path):
    batch = padded(waves(9000, 5000))
    base = expected(model, batch)
    for seed, rank in enumerate((1, 5)):
        source = adapter_of(model, tmp_path / f"adapter{rank}", rank, seed, use_rslora=rank == 5)
        packed = export_onnx_adapter(model, tmp_path / f"{rank}.onnx_adapter", adapter=source)
        plain = tiny_model(model.config, kind=MRLReDimNetForXVector).redimnet
        with torch.inference_mode():
            wanted = PeftModel.from_pretrained(plain, source).eval()(**batch).embeddings
        assert relative_error(wanted, base) > 0.05
        assert relative_error(answers(file, batch, packed), wanted) < 1e-5
        assert relative_error(answers(file, batch), base) < 1e-5
        version = onnxruntime.AdapterFormat.read_adapter(str(packed)).get_model_version()
        assert version == adapter_base_number(facts_of(file)["weights"])


def test_an_adapter_of_another_base_is_refused(model, tmp_path):
    source = adapter_of(model, tmp_path / "adapter", 2, seed=0)
    with pytest.raises(WrongBaseError, match="was trained on me/base"):
        export_onnx_adapter(tiny_model(seed=1), tmp_path / "a.onnx_adapter", adapter=source)
    assert not (tmp_path / "a.onnx_adapter").exists()


@pytest.mark.parametrize(("placement", "options"), [("linear", dict(use_dora=True)), ("conv", {})])
def test_more_than_factors_of_linear_layers_cannot_be_swapped(model, tmp_path, placement, options):
    source = adapter_of(model, tmp_path / "adapter", 2, 0, placement, **options)
    with pytest.raises(ValueError, match="merge it instead"):
        export_onnx_adapter(model, tmp_path / "a.onnx_adapter", adapter=source)


def test_a_model_that_carries_adapters_is_refused(tmp_path):
    bank = AdapterBank.load(tiny_model(), {"a": adapter_of(tiny_model(), tmp_path / "a", 2, seed=0)})
    for carrying in (bank.model, bank.peft):
        with pytest.raises(ValueError, match="AdapterBank.merged"):
            graph_form(carrying)


def test_the_command_merges_an_adapter_into_a_model_of_the_hub_and_packs_it(model, folder, hub, tmp_path, capsys):
    source = adapter_of(model, tmp_path / "adapter", 2, seed=0)
    assert run("push", folder, "anna/base") == 0
    assert run("export", "anna/base", "--to", "torch", "--adapter", source, "--out", tmp_path / "merged.pt2") == 0
    assert run("export", folder, "--to", "onnx-adapter", "--adapter", source, "--out", tmp_path / "a.onnx_adapter") == 0
    assert re.search(r"a\.onnx_adapter: 0\.\d MB\.\n$", capsys.readouterr().out)
    extra = {"mrl_redimnet.json": ""}
    program = torch.export.load(tmp_path / "merged.pt2", extra_files=extra).module()
    facts = json.loads(extra["mrl_redimnet.json"])
    assert facts["adapter"] == "telephony" and facts["weights"] == f"{fingerprint(model)}+{adapter_digest(source)}"
    assert facts["base"] == "anna/base" and facts["revision"] == hub.repositories["anna/base"].resolve("main")
    batch = padded(waves(9000, 5000))
    plain = tiny_model(model.config, kind=MRLReDimNetForXVector).redimnet
    with torch.inference_mode():
        wanted = PeftModel.from_pretrained(plain, source).eval()(**batch).embeddings
    assert relative_error(program(**batch), wanted) < 1e-5


# ---------------------------------------------------------------- what a file knows


def test_thresholds_of_before_fingerprints_knew_the_configuration_are_kept(model, thresholds):
    alone, config = fingerprint(model).split("+config:")
    entry = thresholds.find(8)
    entries = {
        "base": replace(entry, weights=alone),
        "adapter": replace(entry, adapter="telephony", weights=f"{alone}+sha256:1"),
        "other configuration": replace(entry, dim=16, weights=f"{alone}+config:{config[::-1]}"),
        "its adapter": replace(entry, dim=16, adapter="telephony", weights=f"{alone}+config:{config[::-1]}+sha256:1"),
        "averaged": replace(entry, enrolments=3),
    }
    kept = json.loads(export_facts(model, base="me/base", thresholds=Thresholds([*entries.values()]))["thresholds"])
    assert [(each["adapter"], each["enrolments"]) for each in kept] == [(None, 1), ("telephony", 1), (None, 3)]


def test_the_number_of_a_base_knows_its_configuration(model):
    alone, config = fingerprint(model).split("+config:")
    assert adapter_base_number(alone) == int(alone.removeprefix("sha256:")[:8], 16) >> 1
    other = f"{alone}+config:{(int(config, 16) ^ 2**60):016x}"
    assert len({adapter_base_number(each) for each in (alone, fingerprint(model), other)}) == 3
    assert all(0 <= adapter_base_number(each) < 2**31 for each in (fingerprint(model), other))


def test_a_file_says_what_it_is(model, file, thresholds):
    facts = facts_of(file)
    assert json.loads(facts.pop("dims")) == [8, 16, 32]
    kept = json.loads(facts.pop("thresholds"))
    assert [(each["adapter"], each["dim"], each["scorer"]) for each in kept] == [
        (None, 8, "as_norm"), (None, 8, "cosine"), (None, 16, "cosine"), ("telephony", 8, "cosine")
    ]  # fmt: skip
    assert Threshold(**{**kept[1], "calibration": thresholds.find(8).calibration}) == thresholds.find(8)
    assert facts.pop("mrl_redimnet")
    assert facts == {
        "base": "small",
        "revision": "",
        "weights": fingerprint(model),
        "adapter": "",
        "sampling_rate": "16000",
        "min_samples": "257",
        "window_seconds": "1.0",
        "precision": "float32",
    }


def test_no_file_names_a_folder_of_this_machine(file, program):
    with zipfile.ZipFile(program) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    for place in (EXAMPLE.parents[1], Path(torch.__file__).parents[1], file.parent):
        assert str(place).encode() not in content + file.read_bytes()


# ---------------------------------------------------------------- other processes


def test_the_example_needs_no_torch(model, file, tmp_path):
    lengths = (9000, 2 * WINDOW + 4001)  # the second is three windows
    utterances = waves(*lengths)
    for name, wave in zip("ab", utterances, strict=True):
        soundfile.write(tmp_path / f"{name}.wav", wave.numpy(), 16_000, subtype="FLOAT")
    blocked = ("torch", "transformers", "mrl_redimnet", "modeling_mrl_redimnet")
    call = [EXAMPLE, file, tmp_path / "a.wav", tmp_path / "b.wav"]
    done = process(tmp_path, call, blocked)
    a, b = (expected(model, {"input_values": each[None]})[0] for each in utterances)
    for line, dim in zip(done.stdout.splitlines(), (8, 16, 32), strict=True):
        cosine = torch.cosine_similarity(a[:dim], b[:dim], dim=0).item()
        decision = {8: "  same", 16: "  different", 32: ""}[dim]
        assert re.fullmatch(rf" *{dim} dimensions: cosine (-?[\d.]+){decision}", line)
        assert float(line.split()[3]) == pytest.approx(cosine, abs=2e-4)
    soundfile.write(tmp_path / "a.wav", utterances[0].numpy(), 8000)
    refused = process(tmp_path, call, ())
    assert (
        refused.returncode == 1 and "a.wav: 9000 samples at 8000 Hz, expected 257 or more at 16000 Hz" in refused.stderr
    )


@pytest.mark.slow
def test_a_torch_program_needs_nothing_of_this_package(model, program, tmp_path):
    batches = [padded(waves(*lengths), garbage=1.0) for lengths in ((257,), (9000, 257, 4000))]
    torch.save([{**batch, "expected": expected(model, batch)} for batch in batches], tmp_path / "batches.pt")
    code = (
        "import sys, torch; program = torch.export.load(sys.argv[2]).module()\n"
        "for b in torch.load(sys.argv[1] + '/batches.pt'):\n"
        "    found = program(input_values=b['input_values'], attention_mask=b['attention_mask'].long())\n"
        "    print(((found - b['expected']).norm() / b['expected'].norm()).item())"
    )
    blocked = ("transformers", "peft", "mrl_redimnet", "modeling_mrl_redimnet", "configuration_mrl_redimnet")
    done = process(tmp_path, ["-c", code, tmp_path, program], blocked)
    assert done.returncode == 0, done.stderr
    assert len(differences := [float(line) for line in done.stdout.split()]) == 2 and max(differences) < 1e-5


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "model.bin"], "expected a file that ends in .onnx"),
        (["--out", "nowhere/model.onnx"], "there is no folder"),
        (["--out", "a.pt2", "--to", "torch", "--precision", "int8"], "are for --to onnx, not for --to torch"),
        (["--out", "a.onnx_adapter", "--to", "onnx-adapter"], "--to onnx-adapter needs --adapter"),
        (["--out", "a.onnx_adapter", "--to", "onnx-adapter", "--no-mask"], "--no-mask is for models"),
        (["--out", "a.onnx", "--adapter", ".", "--adapter-inputs", "linear"], "give one"),
        (["--out", "a.onnx", "--adapter-inputs", "linear", "--precision", "int8"], "only with precision float32"),
        (["--out", "a.onnx", "--seconds", "1", "3"], "seconds: got 3, the model takes 0.0161 to 1"),
        (["--out", "a.onnx", "--seconds", "1", "--adapter-inputs", "linear"], "takes no adapters"),
        (["--out", "a.pt2", "--to", "torch", "--seconds", "1", "3"], "seconds: got 3, the model takes 0.0161 to 1"),
        (["--out", "a.onnx", "--to", "onnx-weights", "--seconds", "1"], "--seconds is for --to onnx and --to torch"),
    ],
)
def test_the_command_refuses(folder, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, "export", folder, *options)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_kept_unless_told(model, folder, tmp_path, capsys):
    out = tmp_path / "a.onnx_adapter"
    out.write_text("precious")
    options = ("--to", "onnx-adapter", "--adapter", adapter_of(model, tmp_path / "adapter", 2, seed=0), "--out", out)
    assert "exists already: give a new file, or --overwrite" in refusal(capsys, "export", folder, *options)
    assert out.read_text() == "precious"
    assert run("export", folder, *options, "--overwrite") == 0 and out.read_bytes() != b"precious"


def test_what_is_no_model_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert "model" in refusal(capsys, "export", tmp_path, "--out", tmp_path / "a.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_its_cure(folder, tmp_path, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    told = refusal(capsys, "export", folder, "--out", tmp_path / "a.onnx")
    assert f"{package} is not installed: pip install 'mrl-redimnet[export]'" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(precision="float64"), "precision: got 'float64', expected one of float32, float16, int8"),
        (dict(adapter_inputs="conv"), "adapter_inputs: got 'conv', expected one of attention"),
    ],
)
def test_unknown_options_are_refused(model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_onnx(model, tmp_path / "a.onnx", **options)
