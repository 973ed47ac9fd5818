import pytest
import torch
from sae_lens import SAE

import sae_lens_gemma4 as g4
from tests.interp.plain import dense
from tests.support import RELEASE, SAE_ID

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def sae():
    return SAE.from_pretrained(RELEASE, SAE_ID)


@pytest.fixture(scope="module")
def model():
    return g4.load_model("gemma-4-demo", "Gemma4ProxyLM")


@pytest.fixture(scope="module")
def corpus(model):
    """24 blocks, of which the third counts nowhere."""
    whole = g4.build_corpus("embedded:text", model.tokenizer, context_size=32, max_tokens=780)
    corpus = whole.take(torch.arange(24))
    corpus.keep_bp[2] = False
    return corpus


@pytest.fixture(scope="module")
def plain(sae, model, corpus):
    return dense(sae, model, HOOK, corpus)
