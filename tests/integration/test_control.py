"""The control process: promises kept through outages and bugs, hints over a real broker."""

import threading
import time
import uuid
from datetime import timedelta

import pytest

import service.control
from service.adapters.memory import MemoryBlobStore, MemoryTaskQueue
from service.adapters.queue_celery import CeleryQueue, make_app
from service.bootstrap import Services
from service.control import Control, run_control
from service.domain.job import BatchStatus
from service.errors import Unavailable
from service.ports import OutboxKind
from service.tasks import HintListener
from service.usecases.janitor import clean
from service.usecases.sweep import sweep
from tests.integration.jobs import Jobs, lines, settings_for


@pytest.fixture
def jobs(database, tmp_path):
    return Jobs(database, MemoryBlobStore(), settings=settings_for(tmp_path))


def until(condition, limit=20.0):
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def control(jobs):
    """Runs the control process for the test; yields its queue."""
    queue, stop = MemoryTaskQueue(), threading.Event()
    thread = threading.Thread(target=run_control, args=(Services(jobs.settings, jobs.database, jobs.blobs, queue), stop))
    thread.start()
    yield queue
    stop.set()
    thread.join()


def test_a_job_needs_only_a_worker(jobs, control):
    batch = jobs.submit(lines(10))
    until(lambda: "smollm2-135m" in control.woken)
    jobs.drain()
    until(lambda: jobs.load(batch).status is BatchStatus.COMPLETED)


def test_an_item_that_fails_is_put_back_with_its_reason_and_tried_again(jobs, monkeypatch):
    failures = iter([Unavailable("the store is away"), ZeroDivisionError("a bug")])
    real = service.control.validate_batch

    def flaky(item, **parts):
        if error := next(failures, None):
            raise error
        real(item, **parts)

    monkeypatch.setattr(service.control, "validate_batch", flaky)
    monkeypatch.setattr(service.control, "FIRST_DELAY", 0.01)
    stop = threading.Event()
    thread = threading.Thread(target=run_control, args=(Services(jobs.settings, jobs.database, jobs.blobs, MemoryTaskQueue()), stop))
    thread.start()
    batch = jobs.submit(lines(10))
    until(lambda: jobs.load(batch).status is BatchStatus.IN_PROGRESS)
    stop.set()
    thread.join()


def test_leases_of_long_items_are_renewed(jobs, tmp_path, monkeypatch):
    """An item that takes longer than its lease is not started a second time."""
    jobs.settings = settings_for(tmp_path, timing={"lease": 0.6})
    started, release = [], threading.Event()

    def slow(item, **parts):
        started.append(item.token)
        release.wait(10)
        with jobs.database.begin() as uow:
            uow.outbox.done(item)

    monkeypatch.setattr(service.control, "finalize_batch", slow)
    batch = jobs.run(lines(1))
    with jobs.database.begin() as uow:
        uow.outbox.add(OutboxKind.FINALIZE, batch_id=batch.id)
    stop = threading.Event()
    controls = [
        threading.Thread(target=Control(Services(jobs.settings, jobs.database, jobs.blobs, MemoryTaskQueue())).run, args=(stop,))
        for _ in range(2)
    ]
    for thread in controls:
        thread.start()
    until(lambda: started)
    time.sleep(1.5)
    release.set()
    stop.set()
    for thread in controls:
        thread.join()
    assert started == [1]


def test_the_sweep_takes_back_and_wakes_and_is_alone(jobs):
    jobs.run(lines(5))
    with jobs.database.begin() as uow:
        uow.groups.claim("dead", model=None, lease=timedelta(0), max_lines=100)
    swept = sweep(jobs.database)
    assert (swept.taken_back, swept.woken, swept.expired) == (1, 1, 0)
    with jobs.database.begin() as uow:
        assert uow.try_lock("longdraft.sweep")
        assert sweep(jobs.database).skipped


def test_the_janitor_removes_what_nothing_names_and_nothing_else(jobs):
    done, running = jobs.complete(lines(3)), jobs.run(lines(3))
    kept = {info.key for info in jobs.blobs.list("")}
    orphans = [f"segments/{done.id}/9-x.jsonl", f"outputs/{done.id}/7/output.jsonl"]
    of_running = f"segments/{running.id}/1-y.jsonl"
    for key in (*orphans, of_running):
        jobs.blobs.put(key, b"x")
    assert clean(jobs.database, jobs.blobs) == 0, "the batch has only just ended"
    assert clean(jobs.database, jobs.blobs, orphans_after=timedelta(0)) == 2
    assert {info.key for info in jobs.blobs.list("")} == kept | {of_running}


def test_the_janitor_removes_the_objects_of_deleted_files(jobs):
    batch = jobs.complete(lines(3))
    with jobs.database.begin() as uow:
        assert uow.files.delete(batch.project_id, batch.output_file_id)
        assert uow.files.delete(batch.project_id, batch.input_file_id)
    assert clean(jobs.database, jobs.blobs) == 2
    assert not list(jobs.blobs.list("outputs/"))


def test_a_hint_reaches_a_listener_over_the_real_broker(broker_url):
    heard = threading.Event()
    model = f"model-{uuid.uuid4().hex}"
    listener = HintListener(broker_url, lambda name: heard.set() if name == model else None)
    listener.start()
    queue = CeleryQueue(broker_url)
    queue.ping()
    queue.wake(model)
    assert heard.wait(20)
    listener.stop()


def test_a_broker_that_is_away_is_said_to_be(tmp_path):
    queue = CeleryQueue(f"redis+socket://{tmp_path}/nothing.sock")
    with pytest.raises(Unavailable):
        queue.wake("m")
    with pytest.raises(Unavailable):
        queue.ping()


def test_celery_is_set_up_for_hints_only():
    conf = make_app("memory://").conf
    assert conf.accept_content == ["json"]
    assert (conf.task_acks_late, conf.task_ignore_result, conf.worker_prefetch_multiplier) == (False, True, 1)
    assert conf.result_backend is None
