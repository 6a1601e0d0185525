"""An app that stays: for each line on stdin it asks for a token anew, and prints it, or what was wrong, as JSON."""

import json
import sys

from vercel import connect

SLACK = "slack/acme-slack"
APP = connect.ConnectAppTokenSubject()

for line in sys.stdin:
    options = connect.ConnectOptions(force_refresh=line == "anew\n")
    try:
        answer = connect.sync.get_token(SLACK, subject=APP, options=options)
    except connect.ConnectApiError as error:
        answer = {"name": type(error).__name__, "code": error.code, "message": str(error)}
    print(json.dumps(answer), flush=True)
