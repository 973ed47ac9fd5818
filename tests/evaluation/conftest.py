"""The embedded model and its SAE, for tests that measure what there is."""

import pytest

import sae_lens_gemma4 as g4
from sae_lens_gemma4.training.restore import load_sae
from tests.support import RELEASE, SAE_ID


@pytest.fixture(scope="module")
def model():
    return g4.load_model("gemma-4-demo", "Gemma4ProxyLM")


@pytest.fixture(scope="module")
def sae():
    return load_sae(RELEASE, SAE_ID)
