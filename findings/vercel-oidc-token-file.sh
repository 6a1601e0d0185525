#!/usr/bin/env bash
# @vercel/oidc 4.0.9: the two functions that give the token read two different sources.
#
# With VERCEL_OIDC_TOKEN_FILE and VERCEL_OIDC_TOKEN both set, to different unexpired tokens, getVercelOidcToken() gives
# the file's and getVercelOidcTokenSync() the variable's. If the file is not there, the first one fails although the
# variable has a good token, and the second one still gives that.
# For us: a variable alone does not decide which token an app holds; the file has to be taken into account as well.
# Seen on Node.js 20.20.2, Linux.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --silent --no-audit --no-fund --ignore-scripts --prefix . @vercel/oidc@4.0.9

cat >read.mjs <<'JS'
import { writeFileSync } from "node:fs";
import { getVercelOidcToken, getVercelOidcTokenSync } from "@vercel/oidc";

const part = (value) => Buffer.from(JSON.stringify(value)).toString("base64url");
const token = (name) => [part({ alg: "none" }), part({ sub: name, exp: Math.floor(Date.now() / 1000) + 3600 }), "c2ln"].join(".");
const subject = (jwt) => JSON.parse(Buffer.from(jwt.split(".")[1], "base64url")).sub;
const outcome = async (read) => { try { return subject(await read()); } catch (error) { return error.code ?? error.name; } };

writeFileSync("token", token("file"));
process.env.VERCEL_OIDC_TOKEN = token("variable");
for (const file of ["token", "not-there"]) {
  process.env.VERCEL_OIDC_TOKEN_FILE = file;
  console.log(`${file}: async=${await outcome(getVercelOidcToken)} sync=${await outcome(getVercelOidcTokenSync)}`);
}
JS
seen=$(node read.mjs)
expected='token: async=file sync=variable
not-there: async=ENOENT sync=variable'
echo "$seen"
[ "$seen" = "$expected" ] || { echo "changed; expected:"; echo "$expected"; exit 1; }
