#!/usr/bin/env bash
# Vercel CLI 64.0.2: `vercel env pull` changes the values of variables that are in .env.local alone.
#
# It keeps such variables and writes the whole file anew, but by a reader of its own: of a quoted value that spans lines
# only the first line is left, single quotes become a part of the value, and so does a comment behind a value. dotenv
# 17.4.2 reads all of these as meant before, and as they were written after.
# For us: the command that we tell people to run every 12 hours may cost them a private key; `vercel link` and
# `--refresh cli` leave the rest of the file alone.
# Seen on Node.js 20.20.2, Linux.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill "$api" 2>/dev/null || true; rm -rf "$dir"' EXIT
cd "$dir"
# The CLI asks for a version of `sandbox` that not every registry has; nothing here runs it.
echo '{"private": true, "overrides": {"sandbox": "4.5.0"}}' >package.json
npm install --silent --no-audit --no-fund --ignore-scripts vercel@64.0.2 dotenv@17.4.2

# The few answers that the command needs, on loopback.
cat >api.cjs <<'JS'
const fs = require("node:fs");
const project = { id: "prj_example", name: "example", accountId: "team_example" };
const server = require("node:http").createServer((request, response) => {
  const path = request.url.split("?")[0];
  const answer =
    path === "/v2/user" ? { user: { id: "u", email: "ada@example.test", username: "ada", limited: false } }
    : path === "/teams/team_example" ? { id: "team_example", slug: "example", name: "Example" }
    : path === "/v9/projects/prj_example" ? project
    : path.startsWith("/v3/env/pull/prj_example") ? { env: { FROM_VERCEL: "1" }, buildEnv: {} }
    : path.endsWith("/env") ? { envs: [] }
    : null;
  response.writeHead(answer ? 200 : 404, { "content-type": "application/json" });
  response.end(JSON.stringify(answer ?? { error: { code: "not_found", message: path } }));
});
server.listen(0, "127.0.0.1", () => fs.writeFileSync("port", String(server.address().port)));
setTimeout(() => process.exit(), 300000);
JS
node api.cjs & api=$!
until [ -s port ]; do sleep 0.1; done

mkdir -p app/.vercel home
echo '{"projectId":"prj_example","orgId":"team_example"}' >app/.vercel/project.json
cat >app/.env.local <<'ENV'
# Created by Vercel CLI
PEM="first
second"
SINGLE='one'
NOTED="one" # a note
ENV
values() {
    node -p 'const e = require("dotenv").parse(require("fs").readFileSync("app/.env.local"));
        ["PEM", "SINGLE", "NOTED"].map((k) => k + "=" + JSON.stringify(e[k])).join(" ")'
}
before=$(values)
(cd app && HOME="$dir/home" XDG_DATA_HOME="$dir/home" VERCEL_TOKEN=example VERCEL_TELEMETRY_DISABLED=1 NO_UPDATE_NOTIFIER=1 CI=1 \
    timeout 120 ../node_modules/.bin/vercel env pull --yes --api "http://127.0.0.1:$(cat ../port)" >../out 2>&1) || { cat out; exit 1; }
seen="before: $before
after: $(values)"
expected='before: PEM="first\nsecond" SINGLE="one" NOTED="one"
after: PEM="first" SINGLE="'"'one'"'" NOTED="one # a note"'
echo "$seen"
[ "$seen" = "$expected" ] || { echo "changed; expected:"; echo "$expected"; exit 1; }
