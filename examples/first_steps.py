from mrl_redimnet import SpeakerEncoder, recordings

encoder = SpeakerEncoder.from_pretrained("nano")
for dim in (64, 256):
    found = encoder.verify([recordings.FIRST], [recordings.SAME_SPEAKER, recordings.OTHER_SPEAKER], dim=dim)
    for who, decision in zip(("the same woman", "another woman"), found, strict=True):
        verdict = "accepted" if decision.accepted else "rejected"
        print(f"{dim} dimensions, {who}: score {decision.score:.2f}, {verdict} (from {decision.threshold:.2f} on)")
