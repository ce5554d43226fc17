"""Jobs over HTTP: what is accepted, what is stored, and what a request may not reach."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collegium.endpoint import jobs as endpoint
from collegium.endpoint.plans import PlanBody
from collegium.experts.home import Home
from collegium.service import BODY_LIMIT, create_app
from collegium.settings import Settings
from collegium.tests.job_doubles import bare_home, until
from collegium.training.jobs import worker
from collegium.training.jobs.losses import Loss, append_loss
from collegium.training.jobs.store import Jobs

URL = "/v1/collegium/jobs"
ROWS = [{"prompt": f"What is {at} and {at}?", "answer": str(2 * at)} for at in range(3)]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The homes in which a worker would have been started."""
    homes: list[Path] = []

    def ensured(home: Home) -> bool:
        homes.append(home.root)
        return True

    monkeypatch.setattr(worker, "ensure_worker", ensured)
    return homes


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with bare_home(tmp_path / "home", data_folder=str(tmp_path / "data")) as opened:
        (tmp_path / "data").mkdir()
        yield opened


@pytest.fixture
def client(home: Home, started: list[Path]) -> Iterator[TestClient]:
    app = create_app(home.settings)  # without its start, which would load models
    yield TestClient(app, raise_server_exceptions=False)
    app.state.desk.close()


@pytest.fixture
def jobs(home: Home) -> Jobs:
    return Jobs(home.registry)


def plan(**changes: Any) -> dict[str, Any]:
    return {"kind": "train", "plan": {"name": "law", "examples": ROWS, **changes}}


def refused(client: TestClient, body: Any, status: int = 400) -> str:
    response = client.post(URL, json=body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]
    return str(response.json()["error"]["message"])


def test_a_job_is_accepted_and_all_that_it_needs_is_on_the_disk(
    client: TestClient, home: Home, jobs: Jobs, started: list[Path]
) -> None:
    documents = [{"name": "lease.md", "text": "A lease is a contract.\ud800"}, {"name": "tort.txt", "text": "A tort."}]
    given = plan(docs=documents, questions=[{"prompt": "Is it liable?"}], options={"rank": 4}, force=True)
    response = client.post(URL, content=json.dumps(given), headers={"Content-Type": "application/json"})
    assert response.status_code == 202, response.text
    body = response.json()
    assert (body["kind"], body["name"], body["state"], body["cancelling"]) == ("train", "law", "queued", False)
    assert "plan" not in body
    assert started == [home.root]
    stored = jobs.get(body["id"]).plan
    folder = worker.job_folder(home, body["id"]) / "given"
    assert stored["examples"] == [str(folder / "examples.jsonl")]
    assert [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()] == ROWS
    assert stored["docs"] == [str(folder / "docs")]
    assert (folder / "docs" / "lease.md").read_text() == "A lease is a contract.?"
    assert stored["questions"] == [str(folder / "questions.jsonl")]
    assert (stored["options"], stored["force"], stored["test"]) == ({"rank": 4}, True, [])


def test_a_plan_has_the_fields_of_the_command() -> None:
    from collegium.training.plan import Plan, plan_from_dict

    fields = PlanBody(name="law").model_dump()
    assert plan_from_dict(fields) == Plan(name="law")
    assert set(fields) == set(Plan.__dataclass_fields__)


def test_files_of_the_data_folder_may_be_named(client: TestClient, jobs: Jobs, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "docs").mkdir()
    (data / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (data / "link.jsonl").symlink_to(data / "rows.jsonl")
    response = client.post(URL, json=plan(examples=["rows.jsonl", "link.jsonl", ROWS[0]], docs=["docs"]))
    assert response.status_code == 202, response.text
    stored = jobs.get(response.json()["id"]).plan
    assert stored["examples"][:2] == [str(data / "rows.jsonl")] * 2
    assert stored["docs"] == [str(data / "docs")]


def folders(home: Home) -> set[Path]:
    return set((home.root / "jobs").glob("*"))


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../secret.jsonl", "link", "folder/../../secret.jsonl", "~/x", "a\0b", "none", "", "folder"]
)
def test_nothing_else_can_be_reached(client: TestClient, home: Home, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / "data" / "folder").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "secret.jsonl")
    for field in ["examples", "test", "general", "questions", *(["docs"] if name not in ("", "folder") else [])]:
        assert "in the server's data_folder" in refused(client, plan(**{field: [name]}))
    assert folders(home) == set(), "nothing is left of it"


def test_without_the_setting_no_file_is_read(tmp_path: Path, started: list[Path]) -> None:
    with bare_home(tmp_path / "closed") as home:
        app = create_app(home.settings)
        client = TestClient(app)
        assert "opens no folder" in refused(client, plan(examples=["/etc/passwd"]))
        assert started == []
        app.state.desk.close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "Law!"}, "Law!"),
        ({"name": "base"}, "base"),
        ({"examples": [{"prompt": "no answer"}]}, "examples.jsonl"),
        ({"examples": "rows.jsonl"}, "plan.examples"),
        ({"recipe": "magic"}, "magic"),
        ({"limit": 0}, "plan.limit"),
        ({"exmples": []}, "there is no exmples; known: name, examples"),
        ({"docs": [{"name": "../x.md", "text": "x"}]}, "no plain file name"),
        ({"docs": [{"name": ".hidden", "text": "x"}]}, "no plain file name"),
        ({"docs": [{"name": "", "text": "x"}]}, "no plain file name"),
        ({"docs": [{"name": "é" * 101, "text": "x"}]}, "longer than 200 bytes"),
        ({"docs": [{"name": "a.md", "text": "x"}, {"name": "A.md", "text": "y"}]}, "Two documents are named 'A.md'"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_at_once(
    client: TestClient, home: Home, jobs: Jobs, changes: dict[str, Any], said: str
) -> None:
    message = refused(client, plan(**changes))
    assert said in message
    assert str(home.root) not in message
    assert jobs.latest(1) == []
    assert folders(home) == set()


def test_other_kinds_and_bodies_that_are_too_long_are_refused(client: TestClient) -> None:
    assert "kind" in refused(client, {"kind": "proxy", "plan": {"name": "law"}})
    refused(client, plan(description="x" * BODY_LIMIT), 413)


def test_jobs_are_looked_at_cancelled_and_taken_up(
    client: TestClient, home: Home, jobs: Jobs, started: list[Path]
) -> None:
    job = jobs.add("train", "law", {})
    other = jobs.add("train", "tax", {})
    listed = client.get(URL, params={"limit": 1}).json()
    assert (listed["object"], [one["id"] for one in listed["data"]]) == ("list", [other.id])
    assert client.post(f"{URL}/{other.id}/cancel").json()["state"] == "cancelled"
    again = client.post(f"{URL}/{other.id}/cancel")
    assert (again.status_code, again.json()["error"]["code"]) == (400, "invalid_request")
    assert client.post(f"{URL}/{other.id}/resume").json()["state"] == "queued"
    taken = jobs.take(1)
    assert taken
    jobs.advance(job.id, "train", 4, 8, loss=1.5, eta=2.0)
    client.post(f"{URL}/{job.id}/cancel")
    body = client.get(f"{URL}/{job.id}").json()
    assert (body["state"], body["cancelling"], body["step"], body["of"], body["eta"]) == ("running", True, 4, 8, 2.0)
    assert "worker" not in body
    for path in ("", "/cancel", "/resume", "/losses", "/loss.svg"):
        method = "POST" if path in ("/cancel", "/resume") else "GET"
        missing = client.request(method, f"{URL}/ffff{path}")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "job_not_found")
    assert client.get(URL, params={"limit": 0}).status_code == 400


def test_losses_are_numbers_and_a_picture(client: TestClient, home: Home, jobs: Jobs) -> None:
    job = jobs.add("train", "law", {})
    assert client.get(f"{URL}/{job.id}/losses").json()["data"] == []
    worker.job_folder(home, job.id).mkdir(parents=True)
    for loss in (Loss("train", 10, 2.0), Loss("train", 20, float("nan"))):
        append_loss(worker.job_folder(home, job.id), loss)
    assert client.get(f"{URL}/{job.id}/losses").json()["data"] == [
        {"stage": "train", "step": 10, "loss": 2.0},
        {"stage": "train", "step": 20, "loss": None},
    ]
    picture = client.get(f"{URL}/{job.id}/loss.svg")
    assert picture.headers["content-type"] == "image/svg+xml"
    assert "train law" in str(ET.fromstring(picture.text).attrib)


def test_a_server_sees_to_it_that_waiting_jobs_are_worked_on(
    home: Home, started: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "CHECK", 0.01)
    monkeypatch.setattr("collegium.service.Source.open", lambda source: None)
    with TestClient(create_app(home.settings)):
        until(lambda: len(started) > 1)
    count = len(started)
    assert set(started) == {home.root}
    assert len(started) == count, "not after it was stopped"


def test_a_home_that_cannot_be_opened_is_an_error_of_the_request(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    client = TestClient(create_app(Settings(home=tmp_path / "file")))
    assert client.get(URL).json()["error"]["code"] == "invalid_settings"


SOMETHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
PLANS = st.fixed_dictionaries({}, optional=dict.fromkeys(PlanBody.model_fields, SOMETHING))
NAMED = st.fixed_dictionaries({"name": st.sampled_from(["law", "tax"]), "examples": st.just(ROWS)}, optional={
    "docs": st.lists(st.fixed_dictionaries({"name": st.text(max_size=9), "text": st.text(max_size=9)}), max_size=2),
    "questions": st.lists(st.dictionaries(st.text(max_size=5), SOMETHING, max_size=2), max_size=2),
    "options": st.dictionaries(st.text(max_size=5), SOMETHING, max_size=2),
    "description": st.text(), "domain": st.text(max_size=5), "limit": st.integers(), "seed": st.integers(),
})  # fmt: skip


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries({"plan": PLANS | NAMED}) | SOMETHING)
def test_whatever_is_sent_the_server_does_not_fail(client: TestClient, body: Any) -> None:
    content = json.dumps(body)
    response = client.post(URL, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (202, 400), response.text
    if response.status_code == 202:
        assert client.get(f"{URL}/{response.json()['id']}").json() == response.json()
    else:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_the_description_of_the_api_names_every_route(client: TestClient) -> None:
    described = client.get("/openapi.json").json()["paths"]
    assert {path.removeprefix(URL): set(methods) for path, methods in described.items() if path.startswith(URL)} == {
        "": {"get", "post"},
        "/{job_id}": {"get"},
        "/{job_id}/cancel": {"post"},
        "/{job_id}/resume": {"post"},
        "/{job_id}/losses": {"get"},
        "/{job_id}/loss.svg": {"get"},
    }
