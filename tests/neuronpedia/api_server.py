"""A server on this machine that answers as Neuronpedia's self-service API does, and fails when asked to.

Written from the routes (apps/webapp/app/api/… of hijohnnylin/neuronpedia at ebb8426f), and shares nothing with the
package. What matters of its semantics: a batch is one transaction; a latent that is there is skipped, and its examples
are added once more; whatever the code did not foresee is a 500 that does not say why.
"""

import json
import math
import re
import socket
import threading
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULT = "Something went wrong on our end. The error has been reported."
KINDS = {"np_max-act", "np_max-act-logits", "oai_token-act-pair"}


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status, message, path=None):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **({"path": path} if path else {})}


class Cut(Exception):
    """The connection ends without an answer."""


class Neuronpedia:
    """The site's data and its server; `with Neuronpedia() as site:`.

    `site.fail("upload", "500 before", …)` makes the next requests of this kind fail, one fault each; "ok" is none.
    """

    def __init__(self):
        self.users = {"key-of-ann": "ann", "key-of-bob": "bob"}
        self.models = {"gemma-4-e4b": {"id": "gemma-4-e4b", "layers": 42, "creatorId": "team"}}
        self.sets, self.latents = {}, {}
        self.examples, self.explanations = [], []
        self.requests, self.largest = [], 0
        self.faults = defaultdict(list)
        self.slow_s, self.most_latents, self.most_bytes = 0.5, 128, 4_500_000
        self.held, self.release, self.late = threading.Event(), threading.Event(), threading.Event()
        self.lock = threading.RLock()

    def __enter__(self):
        site = self

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # clients that are killed

        class Handler(_Handler):
            pass

        Handler.site = site
        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/api"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.release.set()
        self.server.shutdown()
        self.server.server_close()

    def fail(self, kind, *faults):
        self.faults[kind] += faults

    def add_set(self, name, model="gemma-4-e4b", user="ann", visibility="UNLISTED"):
        layers = self.models[model]["layers"]
        self.sets[model, name] = {
            "name": name, "modelId": model, "description": name, "urls": [""], "creatorId": f"id-of-{user}",
            "creatorName": user, "visibility": visibility,
            "sources": [{"id": f"{i}-{name}", "modelId": model, "setName": name, "visibility": visibility,
                         "creatorId": f"id-of-{user}"} for i in range(layers)],
        }  # fmt: skip

    def count(self, kind):
        return sum(k == kind for k, _ in self.requests)

    def bodies(self, kind="upload"):
        return [body for k, body in self.requests if k == kind]

    def examples_of(self, model, source):
        """How many examples each latent has."""
        return Counter(e["index"] for e in self.examples if (e["model"], e["source"]) == (model, source))

    # --- what the routes do -------------------------------------------------------------------------------------

    def new_model(self, body, user):
        _text(body, "id", longest=32, shortest=2, pattern=r"[a-z][a-z0-9.-]*[a-z0-9]")
        if "--" in body["id"] or ".." in body["id"]:
            raise Refused(400, "Name cannot contain double hyphens", "id")
        _number(body, "layers", 1, 127, whole=True)
        if "displayName" in body:
            _text(body, "displayName", longest=64)
        _url(body)
        if body["id"] in self.models:
            raise Refused(400, "Model already exists")
        self.models[body["id"]] = {
            "id": body["id"], "layers": body["layers"], "creatorId": f"id-of-{user}",
            "displayName": body.get("displayName", body["id"]), "website": body.get("url"),
        }  # fmt: skip
        return self.models[body["id"]]

    def new_set(self, body, user):
        _text(body, "name", pattern=r"[a-z][a-z0-9-]*[a-z0-9]|[a-z0-9]")
        if body["name"] == "neurons" or "--" in body["name"]:
            raise Refused(400, "Name cannot be this", "name")
        _text(body, "modelId")
        if body.get("description") is not None:
            _text(body, "description", longest=128, empty=True)
        _url(body)
        if body["modelId"] not in self.models:
            raise Refused(400, "Model not found")
        if (body["modelId"], body["name"]) in self.sets:
            raise Refused(400, "Source set name already exists for this model.")
        self.add_set(body["name"], body["modelId"], user)
        self.sets[body["modelId"], body["name"]].update(
            description=body.get("description") or body["name"], urls=[body.get("url") or ""]
        )
        return self.get_set(body["modelId"], body["name"], user)

    def get_set(self, model, name, user):
        found = self.sets.get((model, name))
        if found is None:
            return None
        seen = [s for s in found["sources"] if s["visibility"] == "PUBLIC" or s["creatorId"] == f"id-of-{user}"]
        return {**found, "sources": seen, "model": self.models[model]}

    def get_latent(self, model, source, index):
        found = self.latents.get((model, source, index))
        if found is None:
            raise Refused(404, "The model, source, or feature you specified is not available.")
        mine = (model, source, int(index))
        activations = [e for e in self.examples if (e["model"], e["source"], e["index"]) == mine]
        explanations = [e for e in self.explanations if (e["model"], e["source"], e["index"]) == mine]
        return {**found, "activations": activations, "explanations": [{"description": e["text"]} for e in explanations]}

    def upload(self, body, user):
        check_batch(body)
        found = self.sets.get((body["modelId"], _set_of(body["source"])))
        if found is None or found["creatorId"] != f"id-of-{user}":
            raise Refused(500, FAULT)
        if body["source"] not in [s["id"] for s in found["sources"]]:
            raise Refused(500, FAULT)
        indices = [f["index"] for f in body["features"]]
        explanations = [e for f in body["features"] for e in f.get("explanations", ())]
        if len(set(indices)) < len(indices):
            raise Refused(500, FAULT)
        if any(len(a["tokens"]) != len(a["values"]) for f in body["features"] for a in f["activations"]):
            raise Refused(500, FAULT)
        if any(e.get("methodName") is not None and e["methodName"].lower() not in KINDS for e in explanations):
            raise Refused(500, FAULT)
        if len(explanations) > 2048:  # texts that are embedded at once
            raise Refused(500, FAULT)
        failed = Refused(500, "Failed to create features. Please try again or contact support@neuronpedia.org.")
        if any(e.get("modelName") is not None for e in explanations):  # the table has no column of this name
            raise failed
        if not _storable(json.dumps(body)) or len(indices) > self.most_latents:
            raise failed
        for f in body["features"]:
            place = body["modelId"], body["source"]
            self.latents.setdefault((*place, str(f["index"])), {"modelId": place[0], "layer": place[1], **f})
            one = {"model": place[0], "source": place[1], "index": f["index"]}
            self.explanations += [{**one, **e} for e in f.get("explanations", ())]
            self.examples += [{**one, **a} for a in f["activations"]]
        return {"message": f"{len(indices)} features created."}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = self.path.removeprefix("/api/").split("/")
        kind = {
            ("model", "get"): "model", ("model", "new"): "new model", ("source-set", "new"): "new set",
            ("feature", "upload-batch"): "upload",
        }.get(tuple(parts), {"source-set": "set", "feature": "latent"}.get(parts[0], "?"))  # fmt: skip
        try:
            self.reply(*self.result(kind, parts, data))
        except Refused as e:
            self.reply(e.status, e.body)
        except Cut:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def result(self, kind, parts, data):
        site = self.site
        with site.lock:
            fault = site.faults[kind].pop(0) if site.faults[kind] else "ok"
            site.requests.append((kind, json.loads(data) if data else None))
            site.largest = max(site.largest, len(data))
        if fault == "redirect":
            return 308, {}, {"Location": "https://elsewhere.example/api"}
        if fault.startswith("429"):
            _, _, seconds = fault.partition(" after ")
            return 429, {"error": "Rate limit exceeded for this endpoint."}, {"Retry-After": seconds} if seconds else {}
        if fault == "html" or len(data) > site.most_bytes:
            return 413 if len(data) > site.most_bytes else 200, "<html>Not what you asked for</html>", {}
        if fault in ("500 before", "503 before"):
            return int(fault[:3]), {"error": FAULT, "message": FAULT} if fault[0:3] == "500" else "<html>", {}
        if fault == "400":
            raise Refused(400, "this must be a `number` type", "features[0].density")
        if fault == "escape":
            raise Refused(400, "no \x1b[31m\nsuch thing")
        if fault == "401":
            raise Refused(401, "This endpoint requires authorization.")
        if fault == "cut before":
            raise Cut
        if fault in ("hold before", "hold, then commit"):
            site.held.set()
            site.release.wait(30)
            if fault == "hold before":
                raise Cut
        if fault == "slow":
            threading.Event().wait(site.slow_s)
        with site.lock:
            found = self.route(kind, parts, data)
        if fault == "slow":
            site.late.set()
        if fault == "500 after":
            raise Refused(500, FAULT)
        if fault == "504 after":
            return 504, "<html>An error occurred with your deployment</html>", {}
        if fault == "hold after":
            site.held.set()
            site.release.wait(30)
        if fault in ("cut after", "hold after"):
            raise Cut
        return 200, found, {}

    def route(self, kind, parts, data):
        user = self.site.users.get(self.headers.get("X-Api-Key"))
        if user is None and kind in ("new model", "new set", "upload"):
            raise Refused(401, "This endpoint requires authorization. Specify your API key in the header x-api-key.")
        body = json.loads(data, parse_constant=_no_json) if data else None
        if kind == "model":
            return self.site.models.get(body["id"])
        if kind == "new model":
            return self.site.new_model(body, user)
        if kind == "new set":
            return self.site.new_set(body, user)
        if kind == "set":
            return self.site.get_set(parts[1], parts[2], user)
        if kind == "latent":
            return self.site.get_latent(*parts[1:])
        if kind == "upload":
            return self.site.upload(body, user)
        raise Refused(404, "no such route")

    def reply(self, status, body, headers=()):
        text = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


# --- the schema of an upload, one rule a line ---------------------------------------------------------------------


def check_batch(body):
    """Raise what the upload's schema answers."""
    for name in ("modelId", "source"):
        _text(body, name)
    for i, feature in enumerate(_list(body, "features", 128)):
        at = f"features[{i}]."
        _number(feature, "index", 0, 10_000_000, at, whole=True)
        if "density" in feature:
            _number(feature, "density", 0, 1, at)
        for name in ("topLogits", "bottomLogits"):
            for j, logit in enumerate(_list(feature, name, 20, at, shortest=0) if feature.get(name) else ()):
                _text(logit, "token", at=f"{at}{name}[{j}].")
                _number(logit, "value", at=f"{at}{name}[{j}].")
        if "explanations" in feature:
            for j, explanation in enumerate(_list(feature, "explanations", math.inf, at, shortest=0)):
                _text(explanation, "text", longest=512, at=f"{at}explanations[{j}].")
                for name in ("methodName", "modelName"):
                    if explanation.get(name) is not None:
                        _text(explanation, name, empty=True, at=f"{at}explanations[{j}].")
        for j, example in enumerate(_list(feature, "activations", math.inf, at)):
            here = f"{at}activations[{j}]."
            for k in range(len(_list(example, "tokens", 1024, here))):
                _text(dict(enumerate(example["tokens"])), k, at=here)
            for k in range(len(_list(example, "values", 1024, here))):
                _number(dict(enumerate(example["values"])), k, at=here)
            for name, low, high in (
                ("quantileMax", -math.inf, 99_999_999),
                ("quantileMin", -math.inf, 99_999_999),
                ("quantileFraction", 0, 1),
            ):
                if example.get(name) is not None:
                    _number(example, name, low, high, here)


def _text(where, name, longest=math.inf, shortest=1, at="", pattern=None, empty=False):
    value = where.get(name)
    if not isinstance(value, str) or (not value and not empty):
        raise Refused(400, f"{name} is a required field", f"{at}{name}")
    if not (0 if empty else shortest) <= len(value.encode("utf-16-le", "surrogatepass")) / 2 <= longest:
        raise Refused(400, f"{name} must be at most {longest} characters", f"{at}{name}")
    if pattern and not re.fullmatch(pattern, value):
        raise Refused(400, f"{name} must match {pattern}", f"{at}{name}")


def _number(where, name, low=-math.inf, high=math.inf, at="", whole=False):
    value = where.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or (whole and value != int(value)):
        raise Refused(400, f"{name} must be a number, but was {value}", f"{at}{name}")
    if not low <= value <= high or not math.isfinite(value):
        raise Refused(400, f"{name} must be between {low} and {high}", f"{at}{name}")


def _list(where, name, longest, at="", shortest=1):
    value = where.get(name)
    if not isinstance(value, list) or not shortest <= len(value) <= longest:
        raise Refused(400, f"{name} field must have {shortest} to {longest} items", f"{at}{name}")
    return value


def _url(body):
    if body.get("url") is not None and not re.match(r"https?://[^/\s]+\.\w+(/\S*)?$", body["url"]):
        raise Refused(400, "Must be a valid URL", "url")


def _set_of(source):
    return source.partition("-")[2].split("__")[0]


def _storable(text):
    """Whether PostgreSQL takes it: no NUL, no half of a surrogate pair."""
    parsed = json.dumps(json.loads(text), ensure_ascii=False)
    try:
        parsed.encode()
    except UnicodeEncodeError:
        return False
    return not re.search(r"(?<!\\)(\\\\)*\\u0000", parsed)


def _no_json(name):
    raise Refused(500, FAULT)
