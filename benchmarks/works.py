"""Which class does which work.

Owns: the table of Load classes by the names that rows use.
In, Out: nothing. Never: behaviour.
"""

from __future__ import annotations

from benchmarks.loads import Churn, Download, Echo, Idle, Load, Requests, Upload
from benchmarks.mqtt_loads import FanOut, PingPong
from benchmarks.tcp_loads import PrivateTcp, TcpRule
from benchmarks.udp_loads import UdpFlows

WORKS: dict[str, type[Load]] = {
    "echo": Echo,
    "request": Requests,
    "download": Download,
    "upload": Upload,
    "churn": Churn,
    "idle": Idle,
    "fan-out": FanOut,
    "ping-pong": PingPong,
    "udp": UdpFlows,
    "private-tcp": PrivateTcp,
    "tcp-rule": TcpRule,
}
