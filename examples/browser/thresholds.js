// The decisions of thresholds.json on one recording and one other, compared by their cosine.

// By dimensions, a function of both recordings' seconds: the cosine from which on they are of one speaker.
export function thresholdsOf(entries) {
  const known = entries.filter((each) => each.scorer === "cosine" && (each.enrolments ?? 1) === 1);
  return new Map(known.map((each) => [each.dim, (...seconds) => cosineFrom(each, seconds)]));
}

function cosineFrom({ threshold, calibration }, seconds) {
  if (!calibration.seconds) return threshold;
  const [low, high] = calibration.seconds; // else it is a log-likelihood ratio: the cosine that has it at these durations
  const [shorter, longer] = seconds.map((each) => Math.log(Math.min(high, Math.max(low, each)))).sort((a, b) => a - b);
  const offset = calibration.offset + calibration.shorter * shorter + calibration.longer * longer;
  return (threshold - offset) / (calibration.slope + (calibration.steeper ?? 0) * shorter);
}
