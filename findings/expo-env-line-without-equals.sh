#!/usr/bin/env bash
# @expo/env 2.6.0: a line without `=` swallows the assignment below it.
#
# The reader joins the words and the next line into one name, so the variable of that line is not set; nothing is said.
# dotenv 17.4.2, whose files it reads, skips the line and takes the variable. A section head such as `[default]` does
# the same.
# For us: an Expo app may have no VERCEL_OIDC_TOKEN although the file has one that every other reader finds.
# Seen on Node.js 20.20.2, Linux.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --silent --no-audit --no-fund --ignore-scripts --prefix . @expo/env@2.6.0 dotenv@17.4.2

cat >read.cjs <<'JS'
const fs = require("node:fs");
const expo = require("@expo/env");
const dotenv = require("dotenv");
for (const line of ["my notes", "[default]", "# my notes"]) {
  const text = `${line}\nVERCEL_OIDC_TOKEN="one"\n`;
  fs.writeFileSync(".env.local", text);
  const files = expo.parseEnvFiles([".env.local"], { systemEnv: {} });
  console.log(`${line}: expo=${files.env.VERCEL_OIDC_TOKEN} dotenv=${dotenv.parse(text).VERCEL_OIDC_TOKEN}`);
}
JS
seen=$(node read.cjs)
expected='my notes: expo=undefined dotenv=one
[default]: expo=undefined dotenv=one
# my notes: expo=one dotenv=one'
echo "$seen"
[ "$seen" = "$expected" ] || { echo "changed; expected:"; echo "$expected"; exit 1; }
