#!/usr/bin/env bash
# @vercel/oidc 4.0.9: asking for a token without a network ends the Vercel CLI's login.
#
# The login in auth.json has ended (it lives some 8 hours) and the package tries to renew it. If that fails because there
# is no network, it writes `{}` over auth.json: the refresh token, good for days, is gone, and the developer has to run
# `vercel login`. Without the file being touched, the same call would have worked once the network was back.
# For us: an app's own token must never be seen to have ended, or each start of the app on a train costs the login.
# Seen on Node.js 20.20.2, Linux.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --silent --no-audit --no-fund --ignore-scripts --prefix . @vercel/oidc@4.0.9

mkdir -p data/com.vercel.cli .vercel
echo '{"projectId":"prj_example","orgId":"team_example"}' >.vercel/project.json
echo '{"token":"vca_example","refreshToken":"vcr_example","expiresAt":1700000000}' >data/com.vercel.cli/auth.json

cat >ask.mjs <<'JS'
// A machine without a network, whatever this one has.
globalThis.fetch = async () => { throw new TypeError("fetch failed"); };
const { getVercelOidcToken } = await import("@vercel/oidc");
const outcome = await getVercelOidcToken().then(() => "a token", (error) => error.name);
console.log(`outcome: ${outcome}`);
JS
seen=$(env -u VERCEL_OIDC_TOKEN -u VERCEL_OIDC_TOKEN_FILE -u VERCEL_TOKEN -u VERCEL_TOKEN_STORAGE HOME="$dir" XDG_DATA_HOME="$dir/data" node ask.mjs
    echo "auth.json: $(tr -d ' \n' <data/com.vercel.cli/auth.json)")
expected='outcome: VercelOidcTokenError
auth.json: {}'
echo "$seen"
[ "$seen" = "$expected" ] || { echo "changed; expected:"; echo "$expected"; exit 1; }
