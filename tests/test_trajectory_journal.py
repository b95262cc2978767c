"""The journal: torn ends, damage, full disks, and retired segments."""

import asyncio
import errno
import os
import threading

import pytest

from atropos_hpc.contracts.wal_record import EVENT, SNAPSHOT, Record
from atropos_hpc.trajectories.journal import Damaged, Journal, NotWritten

ROOMY = 1 << 20  # bytes of a segment that no test here fills


def event(text: bytes) -> Record:
    return Record(EVENT, text, meta_size=len(text))


def no_state() -> Record:
    return Record(SNAPSHOT, b"")


def write(directory, *texts, at_once=False, segment_bytes=ROOMY):
    """Append events; returns their places."""
    places = []

    async def run():
        journal = Journal(directory, segment_bytes)
        list(journal.replay())
        journal.start(no_state)
        if at_once:
            await asyncio.gather(*(journal.append(event(text), places.append) for text in texts))
        else:
            for text in texts:
                await journal.append(event(text), places.append)
        await asyncio.to_thread(journal.close)

    asyncio.run(run())
    return places


def replay(directory):
    """The events' texts, in order."""
    journal = Journal(directory, ROOMY)
    texts = [
        bytes(record[64 : 64 + header.meta_size])
        for _, header, record in journal.replay()
        if header.kind == EVENT
    ]
    journal.close()
    return texts


def segment(directory, number=0):
    return directory / f"{number:08d}.journal"


def test_what_was_appended_is_replayed_in_order(tmp_path):
    write(tmp_path, b"a", b"bb")
    (tmp_path / "00000000 (copy).journal").write_bytes(segment(tmp_path).read_bytes())
    write(tmp_path, *(b"%d" % i for i in range(2000)), at_once=True)
    assert replay(tmp_path) == [b"a", b"bb", *(b"%d" % i for i in range(2000))]


def test_a_torn_end_is_cut_off_at_every_byte(tmp_path):
    *_, last = write(tmp_path, b"first", b"the last one")
    whole = segment(tmp_path).read_bytes()
    assert len(whole) == last.offset + last.size
    for length in range(last.offset, len(whole)):
        segment(tmp_path).write_bytes(whole[:length])
        assert replay(tmp_path) == [b"first"], length
        assert segment(tmp_path).stat().st_size == last.offset
    segment(tmp_path).write_bytes(whole)
    assert replay(tmp_path) == [b"first", b"the last one"]


def test_a_torn_first_record_leaves_an_empty_journal_that_can_be_written(tmp_path):
    write(tmp_path, b"first")
    segment(tmp_path).write_bytes(segment(tmp_path).read_bytes()[:40])
    write(tmp_path, b"again")
    assert replay(tmp_path) == [b"again"]


@pytest.mark.parametrize("inside", [0, 9, 20, 70])  # magic, seal, header, payload
def test_damage_in_the_middle_is_refused(tmp_path, inside):
    places = write(tmp_path, b"first", b"second", b"third")
    data = bytearray(segment(tmp_path).read_bytes())
    data[places[1].offset + inside] ^= 1
    segment(tmp_path).write_bytes(data)
    with pytest.raises(
        Damaged, match=f"damaged at byte {places[1].offset}: an intact record follows"
    ):
        replay(tmp_path)
    assert segment(tmp_path).read_bytes() == data


def test_damage_in_an_earlier_segment_is_refused(tmp_path):
    write(tmp_path, b"first", b"second", segment_bytes=1)
    data = bytearray(segment(tmp_path).read_bytes())
    data[-9] ^= 1
    segment(tmp_path).write_bytes(data)
    with pytest.raises(Damaged, match="more segments follow"):
        replay(tmp_path)


def test_records_of_one_unfinished_commit_may_be_torn_in_any_order(tmp_path):
    """A power cut may keep later pages of a commit and lose earlier ones; none was acknowledged."""
    write(tmp_path, b"kept")
    places = []

    async def one_commit():
        journal = Journal(tmp_path, ROOMY)
        list(journal.replay())
        journal.start(no_state)
        with journal._wake:  # so that the three are written together
            appends = [
                asyncio.ensure_future(journal.append(event(text), places.append))
                for text in (b"x" * 90, b"y" * 90, b"z" * 90)
            ]
            for _ in range(3):
                await asyncio.sleep(0)
        await asyncio.gather(*appends)
        await asyncio.to_thread(journal.close)

    asyncio.run(one_commit())
    data = bytearray(segment(tmp_path).read_bytes())
    data[places[0].offset : places[1].offset] = bytes(places[1].offset - places[0].offset)
    segment(tmp_path).write_bytes(data)
    assert replay(tmp_path) == [b"kept"]


def test_a_journal_of_another_version_is_refused_and_not_cut_off(tmp_path):
    write(tmp_path, b"first")
    data = bytearray(segment(tmp_path).read_bytes())
    data[3] = ord("1")
    segment(tmp_path).write_bytes(data)
    with pytest.raises(Damaged, match="another version"):
        replay(tmp_path)
    assert segment(tmp_path).read_bytes() == data


def test_a_second_server_is_locked_out(tmp_path):
    first = Journal(tmp_path, ROOMY)
    with pytest.raises(Damaged, match="another trajectory server"):
        Journal(tmp_path, ROOMY, lock_wait_s=0.0)
    first.close()
    Journal(tmp_path, ROOMY).close()


@pytest.mark.parametrize("fails", ["pwritev", "half of pwritev", "fdatasync"])
def test_a_full_disk_keeps_nothing_half_written_and_heals(tmp_path, monkeypatch, fails):
    pwritev, fdatasync = os.pwritev, os.fdatasync

    def no_space(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    def some_space(fd, buffers, offset):
        if len(buffers) > 1 or len(buffers[0]) > 64:
            return pwritev(fd, [bytes(buffers[0])[:40]], offset)
        return no_space()

    async def run():
        journal = Journal(tmp_path, ROOMY)
        list(journal.replay())
        journal.start(no_state)
        places = []
        await journal.append(event(b"before"), places.append)
        size = segment(tmp_path).stat().st_size
        with monkeypatch.context() as patch:
            if fails == "fdatasync":
                patch.setattr(os, "fdatasync", no_space)
            else:
                patch.setattr(os, "pwritev", some_space if "half" in fails else no_space)
            for _ in range(2):
                with pytest.raises(NotWritten, match="No space left"):
                    await journal.append(event(b"lost" * 50), places.append)
            assert journal.read(places[0])[64:70] == b"before"
        assert segment(tmp_path).stat().st_size == size
        await journal.append(event(b"after"), places.append)
        await asyncio.to_thread(journal.close)
        assert len(places) == 2

    asyncio.run(run())
    assert os.fdatasync is fdatasync
    assert replay(tmp_path) == [b"before", b"after"]


def test_what_a_failed_commit_left_cannot_come_back(tmp_path, monkeypatch):
    """The write succeeds, the sync and the truncation fail.

    The next record ends exactly where a left-over one begins.
    """

    def broken(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    async def run():
        journal = Journal(tmp_path, ROOMY)
        list(journal.replay())
        journal.start(no_state)
        await journal.append(event(b"before"), lambda place: None)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", broken)
            patch.setattr(os, "ftruncate", broken)
            with journal._wake:  # so that the two are written together
                appends = [
                    asyncio.ensure_future(journal.append(event(text), lambda place: None))
                    for text in (b"refused", b"revenant")
                ]
                for _ in range(2):
                    await asyncio.sleep(0)
            assert all(
                isinstance(outcome, NotWritten)
                for outcome in await asyncio.gather(*appends, return_exceptions=True)
            )
        await journal.append(event(b"instead"), lambda place: None)
        await asyncio.to_thread(journal.close)

    asyncio.run(run())
    assert replay(tmp_path) == [b"before", b"instead"]


async def three_segments(directory):
    """Begin a journal with one record in each of its segments 0, 1 and 2."""
    journal = Journal(directory, segment_bytes=1)
    list(journal.replay())
    journal.start(no_state)
    places = []
    for text in (b"a", b"b", b"c"):
        await journal.append(event(text), places.append)
    return journal, places


def test_segments_are_retired_only_behind_a_durable_snapshot(tmp_path, monkeypatch):
    async def run():
        journal, places = await three_segments(tmp_path)
        assert [place.segment for place in places] == [0, 1, 2]
        journal.retire(lambda number: number == 0)
        assert sorted(path.name for path in tmp_path.glob("*.journal")) == [
            "00000000.journal",
            "00000002.journal",
        ]
        assert journal.read(places[0])[64:65] == b"a"
        with pytest.raises(KeyError):
            journal.read(places[1])

        def no_space(*arguments):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:  # segment 3 is begun, but its snapshot is not durable
            patch.setattr(os, "pwritev", no_space)
            with pytest.raises(NotWritten):
                await journal.append(event(b"d"), places.append)
        journal.retire(lambda number: False)
        assert segment(tmp_path, 2).exists()
        await journal.append(event(b"d"), places.append)
        journal.retire(lambda number: False)
        await asyncio.to_thread(journal.close)

    asyncio.run(run())
    assert sorted(path.name for path in tmp_path.glob("*.journal")) == ["00000003.journal"]
    assert replay(tmp_path) == [b"d"]


def test_a_segment_that_is_begun_while_older_ones_are_retired_stays(tmp_path):
    """Retiring is in the event loop, and the writing thread may begin a segment at any moment."""

    async def run():
        journal, places = await three_segments(tmp_path)
        retiring, begun = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def live(number):
            if number == 0:
                loop.call_soon_threadsafe(retiring.set)
                assert begun.wait(30)
            return False

        retired = asyncio.create_task(asyncio.to_thread(journal.retire, live))
        await retiring.wait()
        appended = asyncio.ensure_future(journal.append(event(b"d"), places.append))
        while not segment(tmp_path, 3).exists():
            await asyncio.sleep(0.001)
        begun.set()
        await asyncio.gather(retired, appended)
        await asyncio.to_thread(journal.close)

    asyncio.run(run())
    assert sorted(path.name for path in tmp_path.glob("*.journal"))[-1] == "00000003.journal"
    assert replay(tmp_path) == [b"c", b"d"]


def test_nothing_is_acknowledged_in_a_segment_whose_name_is_not_durable(tmp_path, monkeypatch):
    """A power cut removes such a file, with all that is in it."""
    synced = []

    def sync(directory):
        synced.append(directory)
        if len(synced) == 2:
            raise OSError(errno.EIO, "Input/output error")

    async def run():
        monkeypatch.setattr("atropos_hpc.trajectories.journal.sync_directory", sync)
        journal = Journal(tmp_path, segment_bytes=1)
        list(journal.replay())
        journal.start(no_state)
        await journal.append(event(b"a"), lambda place: None)
        with pytest.raises(NotWritten):
            await journal.append(event(b"refused"), lambda place: None)
        assert len(synced) == 2
        await journal.append(event(b"b"), lambda place: None)
        assert len(synced) == 3
        await asyncio.to_thread(journal.close)

    asyncio.run(run())
    assert replay(tmp_path) == [b"a", b"b"]
