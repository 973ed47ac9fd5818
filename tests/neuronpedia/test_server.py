"""The server: what it answers, to whom, and what it refuses."""

import gzip
import http.client
import json
import socket
import threading

import pytest

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.neuronpedia.server import make_server
from tests.neuronpedia.sample import write_dashboards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dashboards(tmp_path_factory.mktemp("served") / "run", d_sae=20, dead=(3, 11))


@pytest.fixture(scope="module")
def server(folder):
    server = make_server(folder, port=0, labels={5: "été", 11: "dead"})
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(5)


@pytest.fixture
def ask(server):
    def request(path, method="GET", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer, body

    return request


def test_the_list_has_the_folder_s_columns_labels_and_dead(ask, folder):
    answer, body = ask("/latents.json")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    columns = json.loads((folder / "latents.json").read_text())
    assert json.loads(body) == {
        **{name: columns[name] for name in ("index", "density", "max", "token", "logit")},
        "dead": [3, 11],
        "labels": {"5": "été", "11": "dead"},
    }
    packed, smaller = ask("/latents.json", Accept_Encoding="br, gzip")
    assert packed.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(smaller) == body and len(smaller) < len(body)


def test_a_latent_is_its_dashboard_with_those_nearest_to_it(ask, folder):
    batch = json.loads((folder / "batch-0.json").read_text())
    stored = next(f for f in batch["features"] if f["feature_index"] == 5)
    found = json.loads(ask("/latent/5.json")[1])
    assert found.pop("nearest") == [[6, 0.5], [7, 0.25], [8, 0.125]]
    assert found == {k: v for k, v in stored.items() if k not in ("vector", "decoder_weights_dist")}
    dead = json.loads(ask("/latent/11.json")[1])
    assert dead == {"feature_index": 11, "dead": True, "nearest": [[12, 0.5], [13, 0.25], [14, 0.125]]}


@pytest.mark.parametrize(
    "path",
    ["/latent/20.json", "/latent/x.json", "/latent/-1.json", "/latent/5", "/batch-0.json", "/../run_settings.json",
     "/latent/..%2frun_settings.json", "/favicon.ico", "/index.html", "/latent/99999999999999.json"],
)  # fmt: skip
def test_nothing_else_is_there(ask, path):
    answer, body = ask(path)
    assert answer.status == 404
    assert json.loads(body)["error"]


def test_heads_are_answered_without_a_body_and_nothing_is_written(ask):
    for path in ("/", "/latents.json", "/latent/5.json"):
        head, nothing = ask(path, "HEAD")
        whole, body = ask(path)
        assert (head.status, nothing) == (200, b"")
        assert head.headers["Content-Length"] == whole.headers["Content-Length"] == str(len(body))
    for method in ("POST", "PUT", "DELETE"):
        assert ask("/", method)[0].status == 501


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8742", "127.0.0.1.evil.example", "", "[", "10.0.0.1"])
def test_a_request_that_was_meant_for_another_host_is_refused(ask, host):
    for path in ("/", "/latents.json", "/latent/5.json"):
        answer, body = ask(path, Host=host)
        assert answer.status == 403
        assert b"pos_str" not in body


def test_a_forwarded_port_is_served(ask):
    for host in ("localhost:9999", "127.0.0.1:1", "[::1]:8742"):
        assert ask("/", Host=host)[0].status == 200


def test_every_answer_forbids_what_the_page_does_not_need(ask):
    for path in ("/", "/latents.json", "/nothing"):
        headers = ask(path)[0].headers
        policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'"
        assert policy["script-src"].startswith("'sha256-") and "unsafe" not in policy["script-src"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in headers


def test_only_this_machine_can_reach_it(server):
    assert server.server_address[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_port}/"


def test_a_taken_port_is_named(server, folder):
    with pytest.raises(ConfigError, match=f"Port {server.server_port} is taken.*--port 0"):
        make_server(folder, port=server.server_port)
    for none in (-1, 65_536):
        with pytest.raises(ConfigError, match="Ports are numbers"):
            make_server(folder, port=none)


def test_a_folder_that_holds_one_of_dashboards_will_do(tmp_path):
    inner = write_dashboards(tmp_path / "dashboards", d_sae=4, dead=())
    with make_server(tmp_path, port=0) as server:
        assert server.viewer.dashboards.path == inner
    with pytest.raises(DataError, match="no folder of dashboards"):
        make_server(inner / "dashboards", port=0)


def test_an_unfinished_folder_is_not_served(tmp_path):
    with pytest.raises(DataError, match="not finished"):
        make_server(write_dashboards(tmp_path / "half", d_sae=4, complete=False), port=0)


def test_a_reader_that_hangs_up_leaves_the_server_quiet(server, ask, capfd):
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.sendall(b"GET /latents.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    assert ask("/")[0].status == 200
    assert capfd.readouterr() == ("", "")
