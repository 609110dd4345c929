"""Every stage, killed ten times at random and five times while it writes a checkpoint, ends the same."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from kill_and_resume import STAGES, kill_and_resume, prepare

SEED = random.SystemRandom().randrange(10**6)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    prepare(folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_survives_kills(base, stage):
    outcome = kill_and_resume(base, stage, kills=10, writing=5, seed=SEED)
    assert not outcome.differences
    assert sum(kill.hit for kill in outcome.kills) >= 15
    assert sum(kill.torn for kill in outcome.kills) >= 5
