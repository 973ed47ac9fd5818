import pytest

from tests.interp.judges.llm_server import KEY, LLMServer
from tests.studies.recipes import small


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """A run of `interp label` by the two baselines, with its export left out."""
    folder = tmp_path_factory.mktemp("labelled") / "run"
    small("label", folder)
    return folder


@pytest.fixture(scope="session")
def contrasted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contrasted") / "run"
    small("contrast", folder)
    return folder


@pytest.fixture
def judges(monkeypatch):
    """Two servers, one of each protocol, and the changes that make a recipe's judges of them."""
    monkeypatch.setenv("KEY_OF_TEST", KEY)
    with LLMServer() as one, LLMServer() as other:
        changes = [
            "judges=["
            + ", ".join(
                f"{{kind: {kind}, model: judge-{kind}, base_url: '{server.url(kind)}', api_key_env: KEY_OF_TEST, "
                "concurrency: 2, retries: 1, timeout_s: 20, usd_per_million_input: 1.0, usd_per_million_output: 1.0}"
                for kind, server in (("openai", one), ("anthropic", other))
            )
            + "]"
        ]
        yield one, other, changes
