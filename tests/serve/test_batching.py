"""The queue in front of a model: what is computed together, refused, left out, and finished at the end."""

import asyncio
import threading
import time

import numpy as np
import pytest

from vit_jax.serve.batching import Batcher, Full, sizes


def batcher(log, *, most=8, wait=0.02, room=16, gate=None):
    """Doubles what it gets, and notes the batches; 13 is an error. `gate` holds the computation back."""

    def double(items):
        if gate:
            assert gate.wait(5)
        log.append(items)
        if 13 in items:
            raise ValueError("13 is bad luck")
        return [2 * item for item in items]

    return Batcher(double, most=most, wait=wait, room=room)


def test_what_arrives_together_is_computed_together_and_each_gets_its_own():
    async def run():
        log = []
        async with batcher(log, wait=5) as queue:
            results = await asyncio.gather(*(queue.submit([i, i + 100]) for i in range(4)))
        assert results == [[2 * i, 2 * i + 200] for i in range(4)]
        assert log == [[0, 100, 1, 101, 2, 102, 3, 103]]  # full, so that nobody waited for five seconds

    asyncio.run(asyncio.wait_for(run(), 4))


def test_one_alone_does_not_wait_and_many_wait_for_as_many_as_last_time():
    async def run():
        log, loop = [], asyncio.get_running_loop()
        async with batcher(log, wait=0.2) as queue:
            start = loop.time()
            for i in range(3):
                assert await queue.submit([i]) == [2 * i]
            assert loop.time() - start < 0.2
            await queue.submit(list(range(11)))  # the three that are left do not wait for eight
            assert loop.time() - start < 0.4
            late = asyncio.create_task(queue.submit([7]))  # of three that are expected
            await asyncio.sleep(0.02)
            await asyncio.gather(queue.submit([8]), late)
            assert loop.time() - start > 0.2
        assert [len(batch) for batch in log] == [1, 1, 1, 8, 3, 2]

    asyncio.run(run())


def test_clients_that_are_answered_apart_come_together():
    async def run():
        log = []

        def slowly(items):
            time.sleep(0.04)
            log.append(items)
            return items

        async def client(i):
            for _ in range(4):
                assert await queue.submit([i]) == [i]

        async with Batcher(slowly, most=8, wait=0, room=8) as queue:
            first = asyncio.create_task(client(0))
            await asyncio.sleep(0.01)  # it is computed alone
            await asyncio.gather(first, *(client(i) for i in range(1, 4)))
        assert [len(batch) for batch in log].count(4) >= 2, log  # 1, 3, 4, 4, 4: not 1 and 3 in turns

    asyncio.run(run())


def test_a_full_queue_refuses_and_who_has_gone_is_not_computed():
    async def run():
        log, gate = [], threading.Event()
        async with batcher(log, most=2, wait=0, room=3, gate=gate) as queue:
            first = asyncio.create_task(queue.submit([0]))
            await asyncio.sleep(0.02)  # it is being computed
            gone, kept = asyncio.create_task(queue.submit([1])), asyncio.create_task(queue.submit([2, 3]))
            await asyncio.sleep(0)
            with pytest.raises(Full):
                await queue.submit([4])
            gone.cancel()
            await asyncio.sleep(0)
            gate.set()
            assert (await first, await kept) == ([0], [4, 6])
        assert log == [[0], [2, 3]] and len(queue) == 0

    asyncio.run(run())


def test_who_has_gone_behind_others_stops_nobody_whatever_the_items_are():
    async def run():
        gate = threading.Event()

        def compute(items):
            assert gate.wait(5)
            return [item["x"].sum() for item in items]

        async with Batcher(compute, most=2, wait=0, room=4) as queue:
            first = asyncio.create_task(queue.submit([{"x": np.ones(2)}]))
            await asyncio.sleep(0.02)  # it is being computed
            kept, gone = (asyncio.create_task(queue.submit([{"x": np.full(2, i)}])) for i in (2, 3))
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.sleep(0)
            gate.set()
            assert (await first, await kept) == ([2], [4])

    asyncio.run(asyncio.wait_for(run(), 5))


def test_an_error_reaches_its_batch_alone_and_the_end_answers_what_was_accepted():
    async def run():
        log = []
        async with batcher(log, most=2, wait=0) as queue:
            with pytest.raises(ValueError, match="bad luck"):
                await queue.submit([13])
            last = asyncio.create_task(queue.submit([5, 6, 7]))
            await asyncio.sleep(0)
        assert await last == [10, 12, 14]
        with pytest.raises(Full):
            await queue.submit([1])

    asyncio.run(run())


def test_a_batch_is_filled_up_to_less_than_twice_what_it_holds():
    assert sizes(1) == [1] and sizes(8) == [1, 2, 4, 8] and sizes(12) == [1, 2, 4, 8, 12]
