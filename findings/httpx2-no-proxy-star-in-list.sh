#!/usr/bin/env bash
# httpx2 2.16.2: a `*` anywhere in NO_PROXY turns every proxy off.
#
# With NO_PROXY='*,internal.example.test', httpx2 asks no proxy for any host. requests 2.34.2 and curl 7.88.1 read `*`
# so only where it is the whole value, and go through the proxy for every other host.
# For us: httpx2 is what the Python SDKs of Vercel send with, so a `*` in a list is one that takes their requests past
# a proxy.
# Seen on Python 3.11.7, Node.js 20.20.2, Linux.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill "$proxy" 2>/dev/null || true; rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check httpx2==2.16.2 requests==2.34.2

# A proxy on loopback that refuses every tunnel and writes down what was asked for.
cat >proxy.py <<'PY'
import socketserver

class Refuse(socketserver.StreamRequestHandler):
    timeout = 30
    def handle(self):
        with open("asked", "a") as asked:
            asked.write(self.rfile.readline().decode())
        self.wfile.write(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")

with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Refuse) as server:
    with open("port", "w") as port:
        port.write(str(server.server_address[1]))
    server.serve_forever()
PY
timeout 300 venv/bin/python proxy.py & proxy=$!
until [ -s port ]; do sleep 0.1; done
export HTTPS_PROXY="http://127.0.0.1:$(cat port)"
unset https_proxy no_proxy ALL_PROXY all_proxy

url=https://api.example.test/
way() { # NAME COMMAND...: whether the command asked the proxy
    local name=$1; shift
    : >asked
    "$@" >/dev/null 2>&1 || true
    if grep -q '^CONNECT api.example.test:443' asked; then echo "$name=proxy"; else echo "$name=direct"; fi
}
all() {
    way httpx2 venv/bin/python -c "import httpx2; httpx2.get('$url')"
    way requests venv/bin/python -c "import requests; requests.get('$url')"
    way curl curl -s --max-time 10 "$url"
}
seen=$(NO_PROXY='internal.example.test' all | paste -sd' '; NO_PROXY='*,internal.example.test' all | paste -sd' ')
expected='httpx2=proxy requests=proxy curl=proxy
httpx2=direct requests=proxy curl=proxy'
echo "$seen"
[ "$seen" = "$expected" ] || { echo "changed; expected:"; echo "$expected"; exit 1; }
