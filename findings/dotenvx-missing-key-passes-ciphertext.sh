#!/usr/bin/env bash
# dotenvx 2.38.2: without the private key, `dotenvx run` starts the command with the encrypted text as the value.
#
# It says on stderr that it could not decrypt, and the exit code is the command's, 0. With --strict it does not start the
# command and ends with 1. A fresh clone is the usual case: .env.keys is not in it.
# For us: a token that begins with `encrypted:` is one that dotenvx has encrypted and no app could use; it is told apart
# from a token that is merely broken.
# Seen on Node.js 20.20.2, Linux x86-64.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --silent --no-audit --no-fund --ignore-scripts --prefix . @dotenvx/dotenvx@2.38.2
dotenvx=$dir/node_modules/.bin/dotenvx

echo 'VERCEL_OIDC_TOKEN="one"' >.env.local
"$dotenvx" encrypt -f .env.local >/dev/null 2>&1
given() { # OPTION...
    local code=0 value
    value=$(env -u VERCEL_OIDC_TOKEN "$dotenvx" run --quiet "$@" -f .env.local -- sh -c 'echo "given $VERCEL_OIDC_TOKEN"' 2>/dev/null) || code=$?
    value=$(sed -n 's/^given //p' <<<"$value")
    echo "value=${value:0:10} exit=$code"
}
seen="with the key: $(given)"
rm -f .env.keys
seen="$seen
without: $(given)
without, strict: $(given --strict)"
expected='with the key: value=one exit=0
without: value=encrypted: exit=0
without, strict: value= exit=1'
echo "$seen"
[ "$seen" = "$expected" ] || { echo "changed; expected:"; echo "$expected"; exit 1; }
