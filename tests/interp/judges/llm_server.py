"""A server on this machine that speaks OpenAI's chat completions and Anthropic's messages, and fails when asked to.

Written from the two protocols, and shares nothing with the package. `server.fail("500", "cut", …)` gives the next
requests one fault each. `server.reply` is what it says: a function of both messages, `good` unless it is replaced.
"""

import json
import re
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-secret-of-this-test"


def data_in(user):
    """The quoted block, read as an attacker hopes: it ends at the first thing that looks like its end."""
    return json.loads(user.split("<data>", 1)[1].split("</data>", 1)[0])


def good(system, user):
    """A label by the first token it is shown; detection by whether the description is in the text."""
    data = data_in(user)
    if "fires" in data:
        return json.dumps({"label": f"token{data['fires'][0]['token']}", "category": "token"})
    word = data["description"].removeprefix("token").strip()
    return json.dumps({"applies": [c["number"] for c in data["contexts"] if word in c["text"]]})


def obedient(system, user):
    """Obeys any order outside of the block to answer something, and any turn that begins in the message."""
    outside = re.sub(r"<data>.*?</data>", "", user, flags=re.DOTALL)
    if turn := re.search(r"<\|?(?:turn|im_start|start_of_turn)\|?>.*|\[/?INST\].*", user, re.DOTALL):
        outside += turn[0]
    if order := re.search(r"answer (\{.*?\})", outside, re.IGNORECASE):
        return order[1]
    return good(system, user)


class LLMServer:
    """`with LLMServer() as server:`; `requests` are the bodies received, `answered` counts messages answered well."""

    def __init__(self, reply=good):
        self.reply, self.faults, self.requests, self.answered, self.headers = reply, [], [], Counter(), []
        self.usage, self.slow_s, self.stops_after, self.busy, self.most_busy = True, 1.0, None, 0, 0
        self.refuses = set()
        self.held, self.release, self.lock = threading.Event(), threading.Event(), threading.Lock()

    def __enter__(self):
        class Handler(_Handler):
            llm = self

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # clients that are killed

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.root = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *_):
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    def url(self, kind):
        return self.root + ("/v1" if kind == "openai" else "")

    def fail(self, *faults):
        self.faults += faults

    def users(self):
        return [_user(body) for body in self.requests]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        llm = self.llm
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with llm.lock:
            llm.requests.append(body)
            llm.headers.append(dict(self.headers))
            fault = llm.faults.pop(0) if llm.faults else "ok"
            if llm.stops_after is not None and len(llm.requests) > llm.stops_after:
                fault = "hold"
            llm.busy += 1
            llm.most_busy = max(llm.most_busy, llm.busy)
        try:
            self.respond(body, fault)
        finally:
            with llm.lock:
                llm.busy -= 1

    def respond(self, body, fault):
        llm = self.llm
        is_openai = self.path == "/v1/chat/completions"
        if not is_openai and self.path != "/v1/messages":
            return self.send(404, {"error": {"message": f"no route {self.path}"}})
        if fault == "hold":
            llm.held.set()
            llm.release.wait(30)
            fault = "cut"
        if fault == "slow":
            llm.release.wait(llm.slow_s)
        if fault == "401":
            return self.send(401, self.error("authentication_error", f"Incorrect API key provided: {KEY}"))
        if fault == "404":
            return self.send(404, self.error("not_found_error", "no such model"))
        if fault.startswith("429"):
            return self.send(429, self.error("rate_limit_error", "slow down"), {"Retry-After": fault.partition(" ")[2]})
        if fault in ("500", "503", "529"):
            return self.send(int(fault), self.error("api_error", "internal"))
        if fault.startswith("400 "):
            return self.send(400, self.error("invalid_request_error", fault[4:]))
        if fault == "redirect":
            return self.send(307, {}, {"Location": llm.root + "/elsewhere"})
        if fault == "html":
            return self.send_raw(200, b"<html>Welcome</html>", "text/html")
        if fault == "broken":
            return self.send_raw(200, b'{"id": "x", "choices": [', "application/json")
        for field in llm.refuses & body.keys():
            return self.send(400, self.error("invalid_request_error", REFUSALS[field]))
        system, user = _system(body), _user(body)
        reason = "end"
        text = {
            "malformed": "Certainly! The label is {",
            "schema": '{"name": "x"}',
            "empty": "",
        }.get(fault)
        if text is None:
            text = llm.reply(system, user)
            text = f"```json\n{text}\n```" if fault == "fenced" else text
        if fault == "truncated":
            text, reason = text[:5], "length"
        data = json.dumps(self.openai(text, reason, body) if is_openai else self.anthropic(text, reason, body)).encode()
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if fault in ("ok", "fenced", "slow"):
            with llm.lock:
                llm.answered[user] += 1
        return self.send_raw(200, data, "application/json")

    def openai(self, text, reason, body):
        usage = {"usage": {"prompt_tokens": tokens(body), "completion_tokens": len(text) // 3 + 1, "total_tokens": 0}}
        return {
            "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": body["model"],
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text},
                         "finish_reason": "length" if reason == "length" else "stop"}],
            **(usage if self.llm.usage else {}),
        }  # fmt: skip

    def anthropic(self, text, reason, body):
        return {
            "id": "msg_1", "type": "message", "role": "assistant", "model": body["model"],
            "content": [{"type": "text", "text": text}],
            "stop_reason": "max_tokens" if reason == "length" else "end_turn", "stop_sequence": None,
            "usage": {"input_tokens": tokens(body), "output_tokens": len(text) // 3 + 1},
        }  # fmt: skip

    def error(self, kind, message):
        return {"type": "error", "error": {"type": kind, "message": message, "code": kind, "param": None}}

    def send(self, status, body, headers=()):
        self.send_raw(status, json.dumps(body).encode(), "application/json", headers)

    def send_raw(self, status, data, kind, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


REFUSALS = {
    "temperature": "Unsupported value: 'temperature' does not support 0 with this model.",
    "max_tokens": "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
}


def tokens(body):
    """What a tokenizer of four characters a token makes of both messages."""
    return (len(_system(body)) + len(_user(body))) // 4


def _system(body):
    return body["system"] if "system" in body else body["messages"][0]["content"]


def _user(body):
    return body["messages"][-1]["content"]
