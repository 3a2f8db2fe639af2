"""MLflow's server with one page more, which `dpar-cli ui` opens: it sets what MLflow keeps in the browser, and goes on.

Without it a click on a run leads to the pages for language models, with an assistant beside them. What the user has chosen
there stays. MLflow finds `app` by the entry point mlflow.app in pyproject.toml.
"""

from __future__ import annotations

import json

from mlflow.server.fastapi_app import app
from starlette.responses import HTMLResponse
from starlette.routing import Route

from pipeline.tracking.ui import HEADLINE_METRICS

PATH = "/dpar"  # what follows the # is the page of MLflow to go on to
_VIEW = {  # what the table of runs keeps for an experiment: MLflow completes it
    "orderByKey": "attributes.start_time",
    "orderByAsc": False,
    "selectedColumns": [f"metrics.`{name}`" for name in HEADLINE_METRICS],
}
_PAGE = """<!doctype html>
<title>DPAR</title>
<script>
  const chosen = {"mlflow.workflowType_v1": '"machine_learning"', "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true"};
  const [, experiment] = location.hash.match(/experiments\\/(\\d+)\\/runs/) ?? [];
  if (experiment) chosen[`MLflowLocalStorage-1.1-ExperimentPage-["${experiment}"]-ReactComponentState`] = VIEW;
  for (const [name, value] of Object.entries(chosen)) {
    if (localStorage.getItem(name) === null) localStorage.setItem(name, value);
  }
  location.replace("/" + location.hash);
</script>
""".replace("VIEW", repr(json.dumps(_VIEW)))

app.router.routes.insert(0, Route(PATH, lambda _: HTMLResponse(_PAGE)))  # before MLflow's own, which take every path

__all__ = ["PATH", "app"]
