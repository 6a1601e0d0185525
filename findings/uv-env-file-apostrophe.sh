#!/usr/bin/env bash
# uv 0.13.9: one apostrophe in an unquoted value hides every variable below it, and the command runs all the same.
#
# `uv run --env-file` stops reading at the line and warns; the exit code is the command's. python-dotenv 1.2.4, which
# most Python projects read the same file with, takes both variables.
# For us: in a file that starts with such a line, an app under `uv run --env-file .env.local` has no VERCEL_OIDC_TOKEN.
# Seen on Python 3.11.7, Linux.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check uv==0.13.9 python-dotenv==1.2.4

cat >.env.local <<'ENV'
GREETING=it's me
VERCEL_OIDC_TOKEN="one"
ENV
cat >show.py <<'PY'
import os
print(os.environ.get("VERCEL_OIDC_TOKEN"))
PY
env -u VERCEL_OIDC_TOKEN -u VIRTUAL_ENV venv/bin/uv run --quiet --no-project --offline --python venv/bin/python --env-file .env.local \
    python show.py >uv.out
dotenv=$(venv/bin/python -c 'import dotenv; print(dotenv.dotenv_values(".env.local")["VERCEL_OIDC_TOKEN"])')
seen="uv=$(cat uv.out) python-dotenv=$dotenv"
expected="uv=None python-dotenv=one"
echo "$seen"
[ "$seen" = "$expected" ] || { echo "changed; expected: $expected"; exit 1; }
