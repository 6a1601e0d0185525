"""An app like any other: all that it does with `vercel-connect`, and what each call cost. Prints one JSON object.

Argument: `sync` or `async`, the half of the package to use.
"""

import asyncio
import json
import os
import sys
import time
import urllib.request

from vercel import connect

SLACK = "slack/acme-slack"
APP = connect.ConnectAppTokenSubject()


def upstream():
    """How many requests went upstream so far."""
    with urllib.request.urlopen(f"{os.environ['CONNECT_SIDECAR_URL']}/_sidecar/v1/status") as reply:
        return json.load(reply)["upstream"]["requests"]


async def main(half):
    results = {}

    package = connect if half == "async" else connect.sync

    async def ask(function, *args, **options):
        answer = getattr(package, function)(*args, **options)
        return await answer if half == "async" else answer

    async def step(name, call):
        before = upstream()
        try:
            value = await call
        except connect.ConnectApiError as error:
            value = {"class": type(error).__name__, "code": error.code, "status": error.status_code}
        results[name] = {"value": value, "cost": upstream() - before}

    def token(connector=SLACK, subject=APP, **options):
        return ask("get_token", connector, subject=subject, **options)

    async def rejected():
        package.delete_token_cache_entry(SLACK, subject=APP)
        return await token()

    async def metadata():
        return (await ask("get_connector_metadata", SLACK)).uid

    async def authorization():
        user = connect.ConnectUserTokenSubject(id="user_ada")
        return (await ask("start_authorization", "oauth/linear", subject=user)).url

    await step("get_token", token())
    await step("again", token())
    await step("force_refresh", token(options=connect.ConnectOptions(force_refresh=True)))
    await step("rejected", rejected())
    # By now the connection of the last call is too old to be used again.
    monotonic = time.monotonic
    time.monotonic = lambda: monotonic() + 3600
    await step("rejected later", rejected())
    await step("user", token(subject=connect.ConnectUserTokenSubject(id="user_ada")))
    await step("start_authorization", authorization())
    await step("get_connector_metadata", metadata())
    await step("not linked", token("salesforce/crm"))
    await step("not installed", token("slack/not-installed"))
    await step("not authorized", token(subject=connect.ConnectUserTokenSubject(id="user_other")))
    await step("not found", token("slack/none"))
    await step("revoke_token", ask("revoke_token", SLACK, subject=APP))
    await step("after revoke_token", token())
    print(json.dumps(results))


asyncio.run(main(sys.argv[1]))
