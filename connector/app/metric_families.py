"""Every metric family of this program: cloudflared's names, types and labels, and our own per rule.

Owns: the table; PARITY.md is held to it. In: nothing. Out: FAMILIES. Never: values (metrics.py has them).
"""

from __future__ import annotations

from typing import Final, NamedTuple

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

SERVED, AS_USED, ABSENT = "yes", "when it happens", "no"
"""`yes`: always there. `when it happens`: a series appears with its first event, as in cloudflared. `no`: never."""


class Family(NamedTuple):
    """One family. `note` says what is different here."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    state: str = SERVED
    note: str = ""


_CLOUDFLARED = (
    Family("build_info", GAUGE, "Version of the program; the value is 1", ("goversion", "type", "revision", "version"),
           note="`goversion` holds Python's version"),
    Family("cloudflared_tunnel_ha_connections", GAUGE, "Edge connections that are up or being made"),
    Family("cloudflared_tunnel_total_requests", COUNTER, "Requests, WebSockets and private TCP streams"),
    Family("cloudflared_tunnel_concurrent_requests_per_tunnel", GAUGE, "Those in flight"),
    Family("cloudflared_tunnel_response_by_code", COUNTER, "Whole responses of origins by status", ("status_code",),
           AS_USED),
    Family("cloudflared_tunnel_request_errors", COUNTER, "Requests that failed or were refused"),
    Family("cloudflared_tunnel_max_concurrent_requests_per_tunnel", GAUGE, "Never set", ("connection_id",), ABSENT,
           "never set there either"),
    Family("cloudflared_tunnel_server_locations", GAUGE, "1: the edge location of a connection; 0: an earlier one",
           ("connection_id", "edge_location"), AS_USED),
    Family("cloudflared_tunnel_tunnel_register_success", COUNTER, "Registrations", ("rpcName",), AS_USED),
    Family("cloudflared_tunnel_tunnel_register_fail", COUNTER, "Registrations that the edge refused",
           ("error", "rpcName"), AS_USED),
    Family("cloudflared_tunnel_tunnel_rpc_fail", COUNTER, "Never set", ("error", "rpcName"), ABSENT,
           "never set there either"),
    Family("cloudflared_tunnel_user_hostnames_counts", COUNTER, "Quick tunnels by host name", ("userHostname",),
           AS_USED),
    Family("tunnel_ids", GAUGE, "Never set", ("tunnel_id", "ha_conn_id"), ABSENT, "never set there either"),
    Family("cloudflared_config_local_config_pushes", COUNTER, "Local configurations reported to the edge"),
    Family("cloudflared_config_local_config_pushes_errors", COUNTER, "Those that failed"),
    Family("cloudflared_orchestration_config_version", GAUGE, "Version of the configuration in force"),
    Family("cloudflared_tcp_active_sessions", GAUGE, "Private TCP streams in flight"),
    Family("cloudflared_tcp_total_sessions", COUNTER, "Private TCP streams"),
    Family("cloudflared_proxy_connect_latency", HISTOGRAM, "Milliseconds to connect a TCP-like service"),
    Family("cloudflared_proxy_connect_streams_errors", COUNTER, "TCP-like services that could not be connected"),
    Family("cloudflared_udp_active_sessions", GAUGE, "UDP sessions (datagrams v2)"),
    Family("cloudflared_udp_total_sessions", COUNTER, "UDP sessions so far (datagrams v2)"),
    Family("cloudflared_udp_active_flows", GAUGE, "UDP flows (datagrams v3)", ("conn_index",), AS_USED),
    Family("cloudflared_udp_total_flows", COUNTER, "UDP flows so far", ("conn_index",), AS_USED),
    Family("cloudflared_udp_failed_flows", COUNTER, "UDP flows that an error ended", ("conn_index",), AS_USED),
    Family("cloudflared_udp_retry_flow_responses", COUNTER, "Registrations of a flow that was there already",
           ("conn_index",), AS_USED),
    Family("cloudflared_udp_migrated_flows", COUNTER, "UDP flows taken over from another connection", ("conn_index",),
           AS_USED),
    Family("cloudflared_udp_unsupported_remote_command_total", COUNTER, "RPC of the other datagram version",
           ("conn_index", "command"), AS_USED),
    Family("cloudflared_udp_dropped_datagrams", COUNTER, "Datagrams dropped", ("conn_index", "reason"), AS_USED),
    Family("cloudflared_icmp_dropped_packets", COUNTER, "ICMP packets dropped", ("conn_index", "reason"), AS_USED),
    Family("cloudflared_icmp_total_requests", COUNTER, "ICMP echo requests"),
    Family("cloudflared_icmp_total_replies", COUNTER, "ICMP echo replies"),
    Family("cloudflared_virtual_origins_dns_requests_total", COUNTER, "Questions to the virtual DNS address",
           ("protocol",), AS_USED),
    Family("cloudflared_rpc_server_operations", COUNTER, "RPC served", ("handler", "method"), AS_USED),
    Family("cloudflared_rpc_server_failures", COUNTER, "RPC served that failed", ("handler", "method"), AS_USED),
    Family("cloudflared_rpc_server_latency_secs", HISTOGRAM, "Seconds to serve an RPC", ("handler", "method"), AS_USED),
    Family("cloudflared_rpc_client_operations", COUNTER, "RPC requested of the edge", ("handler", "method"), AS_USED),
    Family("cloudflared_rpc_client_failures", COUNTER, "RPC requested that failed", ("handler", "method"), AS_USED),
    Family("cloudflared_rpc_client_latency_secs", HISTOGRAM, "Seconds to an RPC's answer", ("handler", "method"),
           AS_USED),
    Family("flow_client_registrations_rate_limited_total", COUNTER, "Flows refused by the limit", ("flow_type",),
           AS_USED),
    Family("quic_client_total_connections", COUNTER, "QUIC connections dialled", (), AS_USED),
    Family("quic_client_closed_connections", COUNTER, "QUIC connections that ended", (), AS_USED),
    Family("quic_client_max_udp_payload", GAUGE, "UDP payload the edge takes", ("conn_index",), AS_USED,
           "with qh3 only"),
    Family("quic_client_sent_frames", COUNTER, "Frames sent", ("conn_index", "frame_type"), ABSENT,
           "the QUIC libraries do not count them"),
    Family("quic_client_sent_bytes", COUNTER, "Bytes of UDP payload sent", ("conn_index",), AS_USED),
    Family("quic_client_received_frames", COUNTER, "Frames received", ("conn_index", "frame_type"), ABSENT,
           "the QUIC libraries do not count them"),
    Family("quic_client_receive_bytes", COUNTER, "Bytes of UDP payload received", ("conn_index",), AS_USED),
    Family("quic_client_buffered_packets", COUNTER, "Packets kept for later", ("conn_index", "packet_type"), ABSENT,
           "the QUIC libraries do not count them"),
    Family("quic_client_dropped_packets", COUNTER, "Bytes of packets dropped",
           ("conn_index", "packet_type", "reason"), ABSENT, "the QUIC libraries do not count them"),
    Family("quic_client_lost_packets", COUNTER, "Packets lost", ("conn_index", "reason"), AS_USED,
           "with qh3 only; `reason` is always `any`"),
    Family("quic_client_min_rtt", GAUGE, "Shortest round trip, ms", ("conn_index",), AS_USED,
           "with qh3 the least that was seen at timers and scrapes"),
    Family("quic_client_latest_rtt", GAUGE, "Last round trip, ms", ("conn_index",), AS_USED),
    Family("quic_client_smoothed_rtt", GAUGE, "Smoothed round trip, ms", ("conn_index",), AS_USED),
    Family("quic_client_mtu", GAUGE, "UDP payload sent at most, bytes", ("conn_index",), AS_USED),
    Family("quic_client_congestion_window", GAUGE, "Bytes that may be in flight", ("conn_index",), AS_USED),
    Family("quic_client_congestion_state", GAUGE, "-1: unknown", ("conn_index",), AS_USED,
           "always -1, unknown: the QUIC libraries do not tell"),
    Family("quic_client_packet_too_big_dropped", COUNTER, "Datagrams too large for a packet", (), AS_USED),
)  # fmt: skip

_RULE = ("rule", "hostname", "path", "service")

_OWN = (
    Family("connector_rule_requests_total", COUNTER, "Requests by ingress rule, WebSockets included", _RULE, AS_USED),
    Family("connector_rule_failures_total", COUNTER, "Requests that failed", _RULE, AS_USED),
    Family("connector_rule_active_requests", GAUGE, "Requests in flight, WebSockets included", _RULE, AS_USED),
    Family("connector_rule_received_bytes_total", COUNTER, "Payload from the edge to the origin", _RULE, AS_USED),
    Family("connector_rule_sent_bytes_total", COUNTER, "Payload from the origin to the edge", _RULE, AS_USED),
    Family("connector_rule_request_seconds", HISTOGRAM, "From request to the end of its response, without WebSockets",
           _RULE, AS_USED),
    Family("connector_rule_websockets_total", COUNTER, "WebSockets opened", _RULE, AS_USED),
    Family("connector_rule_websockets", GAUGE, "WebSockets open", _RULE, AS_USED),
    Family("connector_quic_path", GAUGE, "What is known of QUIC on this network; the value is 1", ("status", "reason")),
    Family("connector_edge_link_ends_total", COUNTER, "Links to the edge and dials that ended",
           ("transport", "reason"), AS_USED),
    Family("connector_failures_total", COUNTER, "Requests that failed, by cause", ("cause",), AS_USED),
    Family("connector_ready_connections", GAUGE, "Edge connections that are registered: what /ready counts"),
    Family("connector_origin_connections", GAUGE, "Connections to origins, idle ones included"),
    Family("promhttp_metric_handler_requests_total", COUNTER, "Scrapes by status", ("code",)),
    Family("promhttp_metric_handler_requests_in_flight", GAUGE, "Scrapes being served"),
)  # fmt: skip

FAMILIES: Final[dict[str, Family]] = {family.name: family for family in (*_CLOUDFLARED, *_OWN)}

CLOUDFLAREDS: Final = frozenset(family.name for family in _CLOUDFLARED)
