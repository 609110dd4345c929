"""How good the detector is: scan score, free-response curve, candidates, vessels, calibration, intervals."""
