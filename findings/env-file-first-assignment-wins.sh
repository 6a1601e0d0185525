#!/usr/bin/env bash
# Deno 2.9.6 and uv 0.13.9 take the first of two assignments in an env file; `just` (rust-just 1.59.0) and dotenv 17.4.2
# take the last one.
#
# For us: after a fresh token was appended to a file that has an old one above, half of the tools of one project send the
# old one. `vercel env pull` and `vercel link` never write two.
# Seen on Node.js 20.20.2, Python 3.11.7, Linux x86-64.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --silent --no-audit --no-fund --ignore-scripts --prefix . deno@2.9.6 dotenv@17.4.2
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check uv==0.13.9 rust-just==1.59.0

printf 'VERCEL_OIDC_TOKEN="first"\nVERCEL_OIDC_TOKEN="last"\n' >.env.local
cat >justfile <<'JUST'
set dotenv-load
set dotenv-filename := ".env.local"
show:
    @echo "$VERCEL_OIDC_TOKEN"
JUST
unset VERCEL_OIDC_TOKEN VIRTUAL_ENV
deno=$(find node_modules/@deno -name deno -type f)
echo 'console.log(Deno.env.get("VERCEL_OIDC_TOKEN"))' >show.ts
echo 'import os; print(os.environ["VERCEL_OIDC_TOKEN"])' >show.py
seen="deno=$("$deno" run --no-config --allow-env --env-file=.env.local show.ts)
uv=$(venv/bin/uv run --quiet --no-project --offline --python venv/bin/python --env-file .env.local python show.py)
just=$(venv/bin/just show)
dotenv=$(node -p 'require("dotenv").parse(require("fs").readFileSync(".env.local")).VERCEL_OIDC_TOKEN')"
expected='deno=first
uv=first
just=last
dotenv=last'
echo "$seen"
[ "$seen" = "$expected" ] || { echo "changed; expected:"; echo "$expected"; exit 1; }
