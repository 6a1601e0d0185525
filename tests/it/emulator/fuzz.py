"""What schemathesis asks with: most names are ones that are there, as a made-up one would never be.

Whatever removes or changes a connector has connectors of its own, so that the others stay as they are.
"""

import random
from urllib.parse import quote

import schemathesis

KNOWN = {
    "connector": ["slack/acme-slack", "github/app", "oauth/linear", "snowflake/dw", "salesforce/crm", "api-key/maps"],
    "project": ["web", "prj_worker"],
    "team": ["acme"],
    "environment": ["development", "production"],
    "service": ["slack"],
    "verifier": [],
    "teamId": ["team_acme"],
    "slug": ["acme"],
    "projectId": ["prj_web"],
    "user": ["user_ada"],
    "id": ["user_ada"],
    "installationId": ["inst_acme", "*"],
    "url": [],
    "life": ["4m", "18446744073709551615s"],
}
SPARE = ["slack/spare", "oauth/spare"]
DICE = random.Random(1)


def known(names, spoils=False):
    """Three of four values that have a known name get a known value."""
    for name in names if isinstance(names, dict) else ():
        values = SPARE if spoils and name == "connector" else KNOWN.get(name)
        if values and DICE.random() < 0.75:
            names[name] = DICE.choice(values)
            yield name


@schemathesis.hook
def before_call(context, case, kwargs):
    for name in known(case.path_parameters, case.method in ("DELETE", "PATCH")):
        # It is put into the path as it is.
        case.path_parameters[name] = quote(case.path_parameters[name], safe="")
    for names in (case.query, case.body, case.body.get("subject") if isinstance(case.body, dict) else None):
        list(known(names))


@schemathesis.hook
def after_call(context, case, response):
    """A consent that has begun can be asked for, and decided."""
    if response.status_code == 200 and case.path.startswith(("/v1/connect/authorize/", "/v1/connect/install/")):
        begun = response.json()
        KNOWN["verifier"][:], KNOWN["url"][:] = [begun["verifier"]], [begun["url"]]
