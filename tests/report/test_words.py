from sae_lens_gemma4.report.words import calibration_sentence


def test_calibration_is_told_from_its_first_to_its_last_state():
    part = {"threshold": 1.0, "kept": True}
    parts = [
        {"name": "none", "ve": -4.651, "l0": 491.2, **part},
        {"name": "threshold", "ve": 0.785, "l0": 16.3, **part},
        {"name": "recentre", "ve": 0.7, "l0": 16.3, **part, "kept": False},
        {"name": "calibrated", "ve": 0.788, "l0": 16.1, **part},
    ]
    [sentence] = calibration_sentence({"tokens": 65536, "parts": parts})
    assert "65,536 tokens" in sentence and "from −4.651 to 0.788" in sentence and "from 491.2 to 16.1" in sentence
    assert sentence.endswith("kept: threshold.")
    assert calibration_sentence(None) == calibration_sentence({"tokens": 1, "parts": []}) == []
