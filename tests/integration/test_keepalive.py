"""A client that pings while it waits for scores is not thrown out for it."""

from __future__ import annotations

import asyncio

import grpc

from vopd_proto import teacher_pb2 as pb
from vopd_proto import teacher_pb2_grpc
from vopd_server.grpc_api import server_options


class SlowTeacher(teacher_pb2_grpc.TeacherServicer):
    async def GetInfo(self, request: pb.GetInfoRequest, context: object) -> pb.GetInfoResponse:
        await asyncio.sleep(6.0)  # gRPC pings once a second at most, and a server forgives two pings too many
        return pb.GetInfoResponse(model_id="slow")


async def ask_while_pinging(options: list[tuple[str, int]]) -> str:
    """The answer, or the status of the call that got none."""
    server = grpc.aio.server(options=options)
    teacher_pb2_grpc.add_TeacherServicer_to_server(SlowTeacher(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pings = [("grpc.keepalive_time_ms", 1000), ("grpc.http2.max_pings_without_data", 0)]
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=pings) as channel:
            answer = await teacher_pb2_grpc.TeacherStub(channel).GetInfo(pb.GetInfoRequest())
            return str(answer.model_id)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    finally:
        await server.stop(grace=None)


async def test_pings_at_the_interval_that_the_server_allows_do_not_end_a_call() -> None:
    ours, grpc_default = await asyncio.gather(
        ask_while_pinging(server_options(2**20, min_ping_interval_ms=500)), ask_while_pinging([])
    )
    assert ours == "slow"
    assert grpc_default == "UNAVAILABLE"  # so the pings were there, and would have ended it
