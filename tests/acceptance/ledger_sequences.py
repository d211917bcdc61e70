"""Two thousand random sequences of submit, run, crash, retry, cancel, expire, reprice and reverse on a real PostgreSQL; O1-O7 after each.

Prints one JSON object. Fails with the shortest sequence that breaks an oracle.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import structlog
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from service.adapters.schema import upgrade
from service.adapters.unit_of_work import PostgresDatabase
from service.embedded import embedded_servers
from tests.integration.jobs import settings_for
from tests.sequences import machine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=30, help="at most, a sequence")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    chosen = settings(
        max_examples=options.sequences,
        stateful_step_count=options.steps,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="longdraft-sequences-") as folder:
        Path(folder).chmod(0o711)  # as root the servers run as another user, who must be able to walk in
        with embedded_servers(Path(folder)) as servers:
            upgrade(servers.migration_database_url)
            database = PostgresDatabase(servers.database_url)
            try:
                bound = machine(database, settings_for(Path(folder)))
                run_state_machine_as_test(bound, settings=chosen)
            finally:
                database.close()
    report = {"sequences": options.sequences, "reversals": bound.reversals, "violations": 0}
    passed = bound.reversals >= options.sequences // 3
    print(json.dumps({**report, "seconds": round(time.monotonic() - started, 1), "pass": passed}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
