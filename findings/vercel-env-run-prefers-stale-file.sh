#!/usr/bin/env bash
# Vercel CLI 64.0.2: `vercel env run` downloads a fresh token and then gives the command the one of .env.local.
#
# The variables are fetched for this very run, VERCEL_OIDC_TOKEN among them, but each that is in .env.local as well has
# that file's value, also a token that ended long ago. Without the file the command gets the fresh one.
# For us: `vercel env run` is no way around an ended token while there is an .env.local; `vercel env pull` is.
# Seen on Node.js 20.20.2, Linux.
set -euo pipefail
dir=$(mktemp -d)
trap 'kill "$api" 2>/dev/null || true; rm -rf "$dir"' EXIT
cd "$dir"
# The CLI asks for a version of `sandbox` that not every registry has; nothing here runs it.
echo '{"private": true, "overrides": {"sandbox": "4.5.0"}}' >package.json
npm install --silent --no-audit --no-fund --ignore-scripts vercel@64.0.2

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
    : path.startsWith("/v3/env/pull/prj_example") ? { env: { VERCEL_OIDC_TOKEN: "fresh" }, buildEnv: {} }
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
given() {
    (cd app && env -u VERCEL_OIDC_TOKEN HOME="$dir/home" XDG_DATA_HOME="$dir/home" VERCEL_TOKEN=example VERCEL_TELEMETRY_DISABLED=1 \
        NO_UPDATE_NOTIFIER=1 CI=1 timeout 120 ../node_modules/.bin/vercel env run --api "http://127.0.0.1:$(cat ../port)" -- \
        node -p '"given " + process.env.VERCEL_OIDC_TOKEN' 2>../err) | sed -n 's/^given //p'
}
seen="without a file: $(given)"
echo 'VERCEL_OIDC_TOKEN="stale"' >app/.env.local
seen="$seen
with one: $(given)"
expected='without a file: fresh
with one: stale'
echo "$seen"
[ "$seen" = "$expected" ] || { echo "changed; expected:"; echo "$expected"; cat err; exit 1; }
