"""The HTTP server's answers, by FastAPI's test client: no port is opened, but for a door that is refused one."""

import json
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest

import bdlm_jax
from bdlm_jax.serving import __main__ as door
from bdlm_jax.serving import artefact

ROOT = Path(__file__).resolve().parents[2]
testclient = pytest.importorskip("fastapi.testclient")
http = pytest.importorskip("bdlm_jax.serving.http")


@pytest.fixture(scope="module")
def run(tiny_run):
    return bdlm_jax.load(tiny_run[1])


@pytest.fixture(scope="module", params=["domain", "lm"])
def client(tiny_run, request, tmp_path_factory):
    """Of a run directory that is gone before the first request: none of them reads the disk."""
    folder = tmp_path_factory.mktemp("http") / "run"
    shutil.copytree(tiny_run[1] / "serving", folder / "serving")
    app = http.make_app(artefact.load_catalogue(folder), artefact.load_arm(folder, request.param), name=request.param)
    shutil.rmtree(folder)
    return testclient.TestClient(app, raise_server_exceptions=False)


def test_it_answers_as_python_does(client, run):
    arm = client.get("/health").json()["arm"]
    expected = run.recommend(["u004", "u001"], arm=arm, k=3).drop(columns="user")
    found = client.post("/batch", json={"users": ["u004", "u001"], "k": 3}).json()
    assert [[row["item"] for row in rows] for rows in found] == [[*expected["item"][:3]], [*expected["item"][3:]]]
    first, row = expected.to_dict("records")[0], found[0][0]
    assert row.pop("score") == pytest.approx(first.pop("score"), rel=1e-4)
    assert row == first
    (one,) = client.post("/recommend", json={"user": "u004", "k": 1}).json()
    assert one["item"] == found[0][0]["item"]
    history = ["i03", next(title for title in run.items.titles if run.items.titles.count(title) == 1)]
    new = run.recommend(histories=[history], arm=arm, k=4)
    rows = client.post("/recommend", json={"history": history, "k": 4}).json()
    assert [row["item"] for row in rows] == [*new["item"]]
    assert client.post("/batch", json={"histories": [history], "k": 4}).json() == [rows]


def test_the_readmes_request_is_answered(client, run):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ((path, body),) = re.findall(r"^curl localhost:8000(/\w+) .* -d '(.*?)'", text, re.M)
    asked = {**json.loads(body), "user": run.users[7]}
    assert len(client.post(path, json=asked).json()) == asked["k"]
    assert json.loads(body).keys() == {"user", "k"}


def test_health_says_what_is_served(client, run):
    told = client.get("/health").json()
    assert (told["status"], told["users"], told["items"]) == ("ok", len(run.users), len(run.items))
    assert told["version"] == bdlm_jax.__version__


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/recommend", {"user": "nobody"}, "user 'nobody' is none of the 150 of this run: give a known id"),
        ("/recommend", {"history": ["ornate"]}, "'ornate' is no item id and no title"),  # a part of titles
        ("/recommend", {"history": ["../../etc/passwd"]}, "is no item id and no title"),
        ("/recommend", {}, "give either users or histories"),
        ("/recommend", {"user": "u004", "history": ["i01"]}, "give either users or histories"),
        ("/recommend", {"user": "u004", "k": 0}, "body.k: Input should be greater than or equal to 1."),
        ("/recommend", {"user": "u004", "k": 10**9}, "body.k: Input should be less than or equal to 1000."),
        ("/recommend", {"user": 4}, "body.user: Input should be a valid string."),
        ("/recommend", {"user": "u" * 301}, "body.user: String should have at most 300 characters."),
        ("/recommend", {"user": "u004", "workdir": "/"}, "body.workdir: Extra inputs are not permitted."),
        ("/batch", {"users": []}, "body.users: List should have at least 1 item"),
        ("/batch", {"users": ["u004"] * 257}, "body.users: List should have at most 256 items"),
        ("/batch", {"histories": [["i01"] * 1001]}, "body.histories.0: List should have at most 1000 items"),
        ("/batch", [], "body: Input should be a valid dictionary"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(client, path, body, told):
    answer = client.post(path, json=body)
    assert answer.status_code == 422
    assert told in answer.json()["detail"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"user": "\\ud800"}'])
def test_a_body_that_is_no_json_is_refused_and_the_server_goes_on(client, body):
    answer = client.post("/recommend", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert client.get("/health").status_code == 200


def test_a_large_body_is_not_read_though_its_length_is_not_told(client):
    sent = []

    def chunks():
        for _ in range(40):
            sent.append(1)
            yield b" " * 50_000

    how = {"headers": {"content-type": "application/json"}}
    answer = client.post("/recommend", content=chunks(), **how)
    assert answer.status_code == 413
    assert answer.json()["detail"] == "a body of more than 1000000 bytes is not read."
    largest = b'{"user": "u004"' + b" " * (http.MOST_BYTES - 16) + b"}"
    assert len(largest) == http.MOST_BYTES
    assert client.post("/recommend", content=largest, **how).status_code == 200


def test_the_door_refuses_in_one_sentence(tiny_run, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ["--workdir", str(tiny_run[1]), "--port"]
        assert door.main([*words, str(taken.getsockname()[1])]) == 2
        assert "cannot listen at 127.0.0.1:" in capsys.readouterr().err
    assert door.main([*words, "99999"]) == 2
    assert "cannot listen at 127.0.0.1:99999" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert door.main([*words, "0"]) == 2
    assert 'uvicorn is missing: pip install "bdlm_jax[http]".' in capsys.readouterr().err


def test_the_door_serves_what_it_loads(tiny_run, monkeypatch):
    uvicorn, served = pytest.importorskip("uvicorn"), []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: served.append((self.config.app, sockets)))
    assert door.main(["--workdir", str(tiny_run[1]), "--arm", "ids_lm", "--port", "0"]) == 0
    ((app, sockets),) = served
    assert testclient.TestClient(app).get("/health").json()["arm"] == "ids_lm"
    assert len(sockets) == 1
