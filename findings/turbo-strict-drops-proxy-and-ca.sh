#!/usr/bin/env bash
# turbo 2.11.11 in its default environment mode: the token and Node's options reach a task, the proxy and the
# certificates do not.
#
# VERCEL_* and NODE_OPTIONS pass without being declared; HTTPS_PROXY, NO_PROXY, NODE_USE_ENV_PROXY, NODE_EXTRA_CA_CERTS
# and SSL_CERT_FILE are dropped. A task on a network with a proxy has the credential and no way out, and a tool that
# hooks in by NODE_OPTIONS finds none of its own variables. `globalPassThroughEnv` lets them through.
# For us: what a preload needs has to be in its own file.
# Seen on Node.js 20.20.2, npm 11.19.1, Linux x86-64.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
mkdir -p apps/web
cat >package.json <<'JSON'
{"name": "root", "private": true, "packageManager": "npm@11.19.1", "workspaces": ["apps/*"]}
JSON
cat >apps/web/package.json <<'JSON'
{"name": "web", "version": "1.0.0", "scripts": {"show": "node ../../show.cjs"}}
JSON
cat >show.cjs <<'JS'
const names = ["VERCEL_OIDC_TOKEN", "NODE_OPTIONS", "HTTPS_PROXY", "NO_PROXY", "NODE_USE_ENV_PROXY", "NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE"];
for (const name of names) console.log(`seen ${name}=${process.env[name] ?? "-"}`);
JS
npm install --silent --no-audit --no-fund --ignore-scripts turbo@2.11.11
export TURBO_TELEMETRY_DISABLED=1 DO_NOT_TRACK=1
export VERCEL_OIDC_TOKEN=t NODE_OPTIONS=--no-warnings HTTPS_PROXY=http://127.0.0.1:9 NO_PROXY=localhost
export NODE_USE_ENV_PROXY=1 NODE_EXTRA_CA_CERTS="$dir/ca.pem" SSL_CERT_FILE="$dir/ca.pem"
: >ca.pem

shown() { # TURBO.JSON
    echo "$1" >turbo.json
    node_modules/.bin/turbo run show 2>&1 | sed -n 's/.*seen //p' | sed "s|=$dir/|=|" | paste -sd' '
}
seen=$(
    shown '{"tasks": {"show": {"cache": false}}}'
    shown '{"globalPassThroughEnv": ["HTTPS_PROXY", "NO_PROXY", "NODE_USE_ENV_PROXY", "NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE"], "tasks": {"show": {"cache": false}}}'
)
expected='VERCEL_OIDC_TOKEN=t NODE_OPTIONS=--no-warnings HTTPS_PROXY=- NO_PROXY=- NODE_USE_ENV_PROXY=- NODE_EXTRA_CA_CERTS=- SSL_CERT_FILE=-
VERCEL_OIDC_TOKEN=t NODE_OPTIONS=--no-warnings HTTPS_PROXY=http://127.0.0.1:9 NO_PROXY=localhost NODE_USE_ENV_PROXY=1 NODE_EXTRA_CA_CERTS=ca.pem SSL_CERT_FILE=ca.pem'
echo "$seen"
[ "$seen" = "$expected" ] || { echo "changed; expected:"; echo "$expected"; exit 1; }
