"""The client's side of the wire: asks teachers for scores. Imports neither torch nor the server."""

from vopd_client.teacher.blocking import RemoteTeacher
from vopd_client.teacher.client import TeacherClient
from vopd_client.teacher.replica import ReplicaUse
from vopd_client.teacher.stream import ScoreStream

__all__ = ["RemoteTeacher", "ReplicaUse", "ScoreStream", "TeacherClient"]
