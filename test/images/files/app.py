"""A web app of one file: a WSGI application behind the standard library's server, one thread per request."""

import json
import os
import signal
import socketserver
import sys
import threading
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

notes = []
lock = threading.Lock()


class Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True


class Handler(WSGIRequestHandler):
    def address_string(self):
        return self.client_address[0]  # no look-up of names


def app(environ, start_response):
    method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
    if (method, path) == ("GET", "/"):
        status, body = "200 OK", {"app": "notes", "greeting": os.environ.get("GREETING", "hello"), "uid": os.getuid()}
    elif (method, path) == ("POST", "/notes"):
        text = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)).decode()
        with lock:
            notes.append(text)
            status, body = "201 Created", {"number": len(notes)}
    elif (method, path) == ("GET", "/notes"):
        with lock:
            status, body = "200 OK", {"notes": list(notes)}
    else:
        status, body = "404 Not Found", {"error": "no such page"}
    payload = json.dumps(body).encode() + b"\n"
    start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(payload)))])
    return [payload]


def main():
    with make_server("", 8080, app, Server, Handler) as server:
        # shutdown() waits for serve_forever, so it must not run in serve_forever's own thread.
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
        print("listening on 8080", flush=True)
        server.serve_forever()
    print("goodbye", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
