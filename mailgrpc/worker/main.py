"""arq's part: the job `drain`, its settings, and the loop that keeps arq alive.

Under `mailgrpc work` our loops run by themselves, and arq's worker beside them: it ends when Redis
goes away, and is started again with growing waits. Under arq's own command,
`arq mailgrpc.worker.main.WorkerSettings`, arq is in charge and starts our loops with itself.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgpack
from arq.worker import Worker as ArqWorker
from arq.worker import func

from mailgrpc.config import Settings, load_settings
from mailgrpc.db.engine import Database
from mailgrpc.doorbell import DRAIN, QUEUE, redis_settings
from mailgrpc.errors import SettingsError
from mailgrpc.worker.runtime import Worker

log = logging.getLogger(__name__)

_POLL_S = 1.0
"""As often as the sweeper looks: what arq brings is no sooner there, and each question wakes a process."""
_RESTART_S = 0.5
_RESTART_MAX_S = 15.0
_CLOSE_S = 2.0


async def drain(ctx: dict[str, Any]) -> None:
    """The job behind a ring: something may be due. It carries nothing, and may come twice."""
    worker: Worker = ctx["worker"]
    worker.wake()


def arq_options(redis_url: str) -> dict[str, Any]:
    """What both ways of running arq's worker have in common."""
    return {
        "functions": [func(drain, name=DRAIN, keep_result=0, max_tries=1)],
        "queue_name": QUEUE,
        "redis_settings": redis_settings(redis_url),
        "job_serializer": msgpack.packb,
        "job_deserializer": msgpack.unpackb,
        "keep_result": 0,
        "max_tries": 1,
        "poll_delay": _POLL_S,
    }


async def keep_arq_running(redis_url: str, worker: Worker) -> None:
    """Run arq's worker for ever: it ends whenever Redis does."""
    wait_s = _RESTART_S
    while True:
        arq = ArqWorker(ctx={"worker": worker}, handle_signals=False, **arq_options(redis_url))
        began = asyncio.get_running_loop().time()
        # Tasks that are watched from outside: arq cancels its jobs when it fails, and one of these
        # cancellations coming through must not be taken for our own end.
        running = asyncio.create_task(arq.async_run())
        try:
            await asyncio.wait({running})
        finally:
            running.cancel()
            closing = asyncio.create_task(arq.close())
            await asyncio.wait({running, closing}, timeout=_CLOSE_S)
            closing.cancel()
            for task in (running, closing):
                task.add_done_callback(_note_end)
        lasted = asyncio.get_running_loop().time() - began
        wait_s = _RESTART_S if lasted > _RESTART_MAX_S else min(wait_s * 2, _RESTART_MAX_S)
        await asyncio.sleep(wait_s)


def _note_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.debug("arq's worker ended: %s", error)


async def _startup(ctx: dict[str, Any]) -> None:
    settings: Settings = ctx["settings"]
    ctx["database"] = Database(settings.database_url, pool_size=settings.database_pool)
    ctx["worker"] = Worker(settings, ctx["database"])
    await ctx["worker"].start()


async def _shutdown(ctx: dict[str, Any]) -> None:
    # Asked for also when the start failed; what was not made is not to be ended.
    if (worker := ctx.get("worker")) is not None:
        await worker.stop()
    if (database := ctx.get("database")) is not None:
        await database.close()


def _worker_settings() -> type:
    settings = load_settings()
    if settings.redis_url is None:
        raise SettingsError("MAILGRPC_REDIS_URL is not set; `mailgrpc work` runs without it")
    return type(
        "WorkerSettings",
        (),
        {
            **arq_options(settings.redis_url),
            "ctx": {"settings": settings},
            "on_startup": _startup,
            "on_shutdown": _shutdown,
        },
    )


def __getattr__(name: str) -> Any:
    # Made when arq asks for it, not when this module is imported: it needs the settings.
    if name == "WorkerSettings":
        return _worker_settings()
    raise AttributeError(name)
