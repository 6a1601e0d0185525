#!/usr/bin/env bash
# Deno 2.9.6 and gaxios 7.3.1 compare the hosts of NO_PROXY by letter case; curl, axios 1.21.1 and httpx2 2.16.2 do not.
#
# With NO_PROXY=API.EXAMPLE.TEST, a request for https://api.example.test goes through the proxy in the first two and
# past it in the others. Names of hosts have no letter case, and URLs are lowercased before they get there.
# For us: whether an entry of NO_PROXY covers a host depends on the client, so an entry is compared without case.
# Seen on Node.js 20.20.2, Python 3.11.7, curl 7.88.1, Linux x86-64.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill "$proxy" 2>/dev/null || true; rm -rf "$dir"' EXIT
cd "$dir"
npm install --silent --no-audit --no-fund --ignore-scripts --prefix . deno@2.9.6 gaxios@7.3.1 axios@1.21.1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check httpx2==2.16.2

# A proxy on loopback that refuses every tunnel and writes down what was asked for.
cat >proxy.cjs <<'JS'
const fs = require("node:fs");
const server = require("node:http").createServer();
server.on("connect", (request, socket) => {
  fs.appendFileSync("asked", request.url + "\n");
  socket.end("HTTP/1.1 502 Bad Gateway\r\n\r\n");
});
server.listen(0, "127.0.0.1", () => fs.writeFileSync("port", String(server.address().port)));
setTimeout(() => process.exit(), 300000);
JS
node proxy.cjs & proxy=$!
until [ -s port ]; do sleep 0.1; done
export HTTPS_PROXY="http://127.0.0.1:$(cat port)"
unset https_proxy no_proxy ALL_PROXY all_proxy

url=https://api.example.test/
deno=$(find node_modules/@deno -name deno -type f)
way() { # NAME COMMAND...: whether the command asked the proxy
    local name=$1; shift
    : >asked
    "$@" >/dev/null 2>&1 || true
    if grep -qx 'api.example.test:443' asked; then echo "$name=proxy"; else echo "$name=direct"; fi
}
all() {
    way deno "$deno" eval "await fetch('$url').catch(() => {})"
    way gaxios node -e "import('gaxios').then(g => g.request({url: '$url', retry: false})).catch(() => {})"
    way curl curl -s --max-time 10 "$url"
    way axios node -e "require('axios').get('$url').catch(() => {})"
    way httpx2 venv/bin/python -c "import httpx2; httpx2.get('$url')"
}
seen=$(NO_PROXY=api.example.test all | paste -sd' '; NO_PROXY=API.EXAMPLE.TEST all | paste -sd' ')
expected='deno=direct gaxios=direct curl=direct axios=direct httpx2=direct
deno=proxy gaxios=proxy curl=direct axios=direct httpx2=direct'
echo "$seen"
[ "$seen" = "$expected" ] || { echo "changed; expected:"; echo "$expected"; exit 1; }
