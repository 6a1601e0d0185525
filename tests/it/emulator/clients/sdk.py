"""A program with `vercel-connect`, straight at the emulator: all calls, and each error. Prints one JSON object.

Arguments: the emulator's origin; `sync` or `async`, the half of the package to use.
"""

import asyncio
import json
import os
import sys
import urllib.request

from vercel import connect
from vercel.api import session

EMULATOR, HALF = sys.argv[1:]
SLACK = "slack/acme-slack"
APP = connect.ConnectAppTokenSubject()
USER = connect.ConnectUserTokenSubject(id="user_new")


def own(method, route, body=None):
    """A route of the emulator's own: what a person does, what is to go wrong."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{EMULATOR}/_emulator/{route}", data, method=method)
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()


async def main():
    results = {}
    package = connect if HALF == "async" else connect.sync

    async def ask(function, *args, **options):
        answer = getattr(package, function)(*args, **options)
        return await answer if HALF == "async" else answer

    async def step(name, call):
        try:
            results[name] = await call
        except connect.ConnectError as error:
            results[name] = [type(error).__name__, getattr(error, "code", None), getattr(error, "status_code", None)]

    def token(connector=SLACK, subject=APP, **options):
        return ask("get_token", connector, subject=subject, **options)

    async def failing(fault):
        own("POST", "faults", {"on": "/v1/connect/token/", **fault})
        try:
            return await token("oauth/linear", options=connect.ConnectOptions(force_refresh=True))
        finally:
            own("DELETE", "faults")

    async def decided(subject, **decision):
        begun = await ask("start_authorization", SLACK, subject=subject, return_url="http://localhost:3000/done")
        own("POST", "consents", {"url": begun.url, **decision})

    async def again():
        package.delete_token_cache_entry(SLACK, subject=APP)
        first = await token()
        connect.clear_token_cache() if HALF == "async" else package.clear_token_cache()
        return first == await token()

    await step("app", token())
    await step("again", again())
    response = await ask("get_token_response", SLACK, subject=APP)
    results["response"] = [response.connector.uid, response.tenant_id]
    results["metadata"] = (await ask("get_connector_metadata", SLACK)).uid
    await step("before consent", token(subject=USER))
    await decided(USER, deny=True)
    await step("after denial", token(subject=USER))
    await decided(USER)
    await step("after consent", token(subject=USER))
    await step("revocation", ask("revoke_token", SLACK, subject=USER))
    await step("after revocation", token(subject=USER))

    await step("not linked", token("salesforce/crm"))
    await step("not enabled", token("snowflake/warehouse"))
    await step("not installed", token("slack/not-installed"))
    await step("not found", token("slack/none"))
    await step("no token", failing({"kind": "revoked_grant"}))
    for code in ["authorization_pending", "slow_down", "access_denied", "expired_token", "invalid_grant"]:
        await step(code, failing({"kind": "status", "status": 400, "code": code}))
    await step("unauthorized", failing({"kind": "unauthorized"}))
    await step("wrong JSON", failing({"kind": "wrong_json"}))
    await step("wrong address", ask("start_authorization", SLACK, subject=USER, return_url="http://evil.example/"))
    await step("no webhook", ask("verify_connect_webhook", {}, project_id="prj_web", environment="development"))
    del os.environ["VERCEL_OIDC_TOKEN"]
    await step("no credential", token(options=connect.ConnectOptions(force_refresh=True)))
    print(json.dumps(results))


async def run():
    options = [connect.ConnectServiceOptions(base_url=EMULATOR)]
    if HALF == "async":
        async with session(service_options=options):
            await main()
    else:
        with session(service_options=options):
            await main()


asyncio.run(run())
