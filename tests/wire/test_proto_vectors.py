"""The golden bytes of proto/vectors against the schemas: IDs, layouts and every field, read by pycapnp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import capnp
import pytest

from connector.transport.rpc import ABORT_SHUTDOWN, load_schema
from connector.wire.capnp import message_length
from tests.support.vectors import VECTORS, all_vectors, load, vector

TUNNELRPC = load_schema("tunnelrpc")
QUIC = load_schema("quic_metadata.capnp")
RPC = capnp.load(str(Path(capnp.__file__).parent / "rpc.capnp"), imports=[str(Path(capnp.__file__).parent.parent)])

Read = Callable[[str], Any]

STRUCTS = {
    "ClientInfo": (0x83CED0145B2F114B, 0, 4),
    "ConnectionOptions": (0xB4BF9861FE035D04, 1, 2),
    "ConnectionResponse": (0xDBAA9D03D52B62DC, 1, 1),
    "ConnectionError": (0xF5F383D2785EDB86, 2, 1),
    "ConnectionDetails": (0xB5F39F082B9AC18A, 1, 2),
    "TunnelAuth": (0x9496331AB9CD463F, 0, 2),
    "RegisterUdpSessionResponse": (0xAB6D5210C1F26687, 0, 2),
    "UpdateConfigurationResponse": (0xDB58FF694BA05CF9, 1, 1),
    "Authentication": (0xC082EF6E0D42ED1D, 0, 3),
    "TunnelRegistration": (0xF41A0F001AD49E46, 1, 6),
    "RegistrationOptions": (0xC793E50592935B4A, 2, 8),
    "ServerInfo": (0xF2C68E2547EC3866, 0, 1),
    "AuthenticateResponse": (0x82C325A07AD22A65, 1, 3),
    "Tag": (0xCBD96442AE3BB01A, 0, 2),
}
QUIC_STRUCTS = {
    "ConnectRequest": (0xC47116A1045E4061, 1, 2),
    "Metadata": (0xE1446B97BFD1CD37, 0, 2),
    "ConnectResponse": (0xB1032EC91CEF8727, 0, 2),
}
PARAMETERS = {
    ("RegistrationServer", "registerConnection"): (1, 3),
    ("RegistrationServer", "unregisterConnection"): (0, 0),
    ("RegistrationServer", "updateLocalConfiguration"): (0, 1),
    ("SessionManager", "registerUdpSession"): (2, 3),
    ("SessionManager", "unregisterUdpSession"): (0, 2),
    ("ConfigurationManager", "updateConfiguration"): (1, 1),
}
INTERFACES = {
    "RegistrationServer": 0xF71695EC7FE85497,
    "SessionManager": 0x839445A59FB01686,
    "ConfigurationManager": 0xB48EDFBDAA25DB04,
    "CloudflaredServer": 0xF548CEF9DEA2A4A1,
    "TunnelServer": 0xEA58385C65416035,
}


def words_of(node: Any) -> tuple[int, int]:
    return node.struct.dataWordCount, node.struct.pointerCount


@pytest.mark.parametrize("name", STRUCTS)
def test_struct_ids_and_layout(name: str) -> None:
    node = getattr(TUNNELRPC, name).schema.node
    assert (node.id, *words_of(node)) == STRUCTS[name]


@pytest.mark.parametrize("name", QUIC_STRUCTS)
def test_quic_struct_ids_and_layout(name: str) -> None:
    node = getattr(QUIC, name).schema.node
    assert (node.id, *words_of(node)) == QUIC_STRUCTS[name]


def test_enums() -> None:
    types = QUIC.ConnectionType.schema
    assert types.node.id == 0xC52E1BAC26D379C8
    assert types.enumerants == {"http": 0, "websocket": 1, "tcp": 2}
    policies = TUNNELRPC.ExistingTunnelPolicy.schema
    assert policies.node.id == 0x84CB9536A2CF6D3C
    assert policies.enumerants == {"ignore": 0, "disconnect": 1, "balance": 2}


def test_interfaces_and_inheritance() -> None:
    for name, number in INTERFACES.items():
        assert getattr(TUNNELRPC, name).schema.node.id == number
    supers = {name: [s.node.id for s in getattr(TUNNELRPC, name).schema.superclasses] for name in INTERFACES}
    assert supers["TunnelServer"] == [INTERFACES["RegistrationServer"]]
    assert supers["CloudflaredServer"] == [INTERFACES["SessionManager"], INTERFACES["ConfigurationManager"]]
    assert not TUNNELRPC.CloudflaredServer.schema.method_names
    assert list(TUNNELRPC.TunnelServer.schema.method_names) == [
        "registerTunnel",
        "getServerInfo",
        "unregisterTunnel",
        "obsoleteDeclarativeTunnelConnect",
        "authenticate",
        "reconnectTunnel",
    ]


@pytest.mark.parametrize(("interface", "method"), PARAMETERS)
def test_parameter_layout(interface: str, method: str) -> None:
    node = getattr(TUNNELRPC, interface).schema.methods[method].param_type.node
    assert words_of(node) == PARAMETERS[interface, method]


def test_vector_files_are_sound() -> None:
    names = [entry["name"] for path in VECTORS.glob("*.json") for entry in load(path.name)]
    assert len(names) == len(set(names)) == 25
    for entry in all_vectors().values():
        assert len(bytes.fromhex(entry["hex"])) == entry["bytes"]
        assert entry["meaning"]


@pytest.fixture
def message() -> Iterator[Callable[[str], Any]]:
    with ExitStack() as stack:

        def read(name: str) -> Any:
            data = vector(name)
            assert message_length(data) == len(data)
            return stack.enter_context(RPC.Message.from_bytes(data))

        yield read


def content(payload: Any, struct: Any) -> Any:
    return payload.content.as_struct(struct.schema if hasattr(struct, "schema") else struct)


def parameters(interface: str, method: str) -> Any:
    return getattr(TUNNELRPC, interface).schema.methods[method].param_type


def results(interface: str, method: str) -> Any:
    return getattr(TUNNELRPC, interface).schema.methods[method].result_type


def test_bootstrap_is_canonical(message: Read) -> None:
    assert message("rpc_bootstrap_q0").bootstrap.questionId == 0
    built = RPC.Message.new_message()
    built.init("bootstrap").questionId = 0
    assert built.to_bytes() == vector("rpc_bootstrap_q0")


def test_register_connection(message: Read) -> None:
    call = message("rpc_call_registerConnection_q1").call
    assert (call.questionId, call.interfaceId, call.methodId) == (1, 0xF71695EC7FE85497, 0)
    assert call.target.promisedAnswer.questionId == 0
    assert content(call.params, parameters("RegistrationServer", "registerConnection")).to_dict() == {
        "auth": {"accountTag": "0123456789abcdef0123456789abcdef", "tunnelSecret": bytes(range(32))},
        "tunnelId": bytes.fromhex("f1e2d3c4b5a649788a9b0c1d2e3f4a5b"),
        "connIndex": 0,
        "options": {
            "client": {
                "clientId": bytes.fromhex("1122334455664778899aabbccddeeff0"),
                "features": [
                    "allow_remote_config",
                    "serialized_headers",
                    "support_datagram_v2",
                    "support_quic_eof",
                    "management_logs",
                ],
                "version": "2026.8.2",
                "arch": "linux_amd64",
            },
            "originLocalIp": bytes.fromhex("00000000000000000000ffffc0a80105"),
            "replaceExisting": False,
            "compressionQuality": 0,
            "numPreviousAttempts": 0,
        },
    }


def test_return_of_bootstrap(message: Read) -> None:
    answer = getattr(message("rpc_return_bootstrap"), "return")
    assert answer.answerId == 0
    assert answer.releaseParamCaps is False  # the bit is set, and it is stored inverted
    assert answer.results.capTable[0].senderHosted == 0


def test_return_with_details(message: Read) -> None:
    answer = getattr(message("rpc_return_registerConnection_details"), "return")
    result = content(answer.results, results("RegistrationServer", "registerConnection")).result.result
    assert result.which() == "connectionDetails"
    assert result.connectionDetails.to_dict() == {
        "uuid": bytes.fromhex("0a1b2c3d4e5f406182738495a6b7c8d9"),
        "locationName": "lis01",
        "tunnelIsRemotelyManaged": True,
    }


def test_return_with_error(message: Read) -> None:
    answer = getattr(message("rpc_return_registerConnection_error"), "return")
    result = content(answer.results, results("RegistrationServer", "registerConnection")).result.result
    assert result.which() == "error"
    assert result.error.to_dict() == {"cause": "try later", "retryAfter": 5_000_000_000, "shouldRetry": True}


@pytest.mark.parametrize(
    ("name", "question", "release"), [("rpc_finish_q0_keep", 0, False), ("rpc_finish_q1_release", 1, True)]
)
def test_finish(message: Read, name: str, question: int, release: bool) -> None:
    finish = message(name).finish
    assert (finish.questionId, finish.releaseResultCaps) == (question, release)


def test_unregister_connection(message: Read) -> None:
    call = message("rpc_call_unregisterConnection_q1").call
    assert (call.questionId, call.interfaceId, call.methodId) == (1, 0xF71695EC7FE85497, 1)
    assert (call.target.which(), call.target.importedCap) == ("importedCap", 0)


def test_exception_and_abort(message: Read) -> None:
    answer = getattr(message("rpc_return_exception"), "return")
    assert (answer.answerId, answer.exception.reason, str(answer.exception.type)) == (1, "boom", "failed")
    abort = message("rpc_abort_shutdown").abort
    assert (abort.reason, str(abort.type)) == ("rpc: shutdown", "failed")
    assert vector("rpc_abort_shutdown") == ABORT_SHUTDOWN


def test_update_configuration(message: Read) -> None:
    call = message("rpc_call_updateConfiguration_q1").call
    assert (call.interfaceId, call.methodId) == (0xB48EDFBDAA25DB04, 0)
    assert content(call.params, parameters("ConfigurationManager", "updateConfiguration")).to_dict() == {
        "version": 7,
        "config": b'{"ingress":[{"service":"http_status:404"}]}',
    }
    answer = getattr(message("rpc_return_updateConfiguration"), "return")
    result = content(answer.results, results("ConfigurationManager", "updateConfiguration")).result
    assert (result.latestAppliedVersion, result.err) == (7, "")


def test_udp_sessions(message: Read) -> None:
    call = message("rpc_call_registerUdpSession_q1").call
    assert (call.interfaceId, call.methodId) == (0x839445A59FB01686, 0)
    session = bytes.fromhex("0a1b2c3d4e5f406182738495a6b7c8d9")
    params = content(call.params, parameters("SessionManager", "registerUdpSession"))
    assert params.traceContext == ""
    assert params.to_dict() == {
        "sessionId": session,
        "dstIp": bytes([10, 0, 0, 53]),
        "dstPort": 53,
        "closeAfterIdleHint": 210_000_000_000,
    }
    call = message("rpc_call_unregisterUdpSession_q1").call
    assert (call.interfaceId, call.methodId) == (0x839445A59FB01686, 1)
    assert content(call.params, parameters("SessionManager", "unregisterUdpSession")).to_dict() == {
        "sessionId": session,
        "message": "session idle for 3m30s",
    }


PREAMBLE = bytes.fromhex("0a36cd12a13e3031")


def quic(name: str, struct: Any) -> Any:
    data = vector(name)
    assert data[:8] == PREAMBLE
    assert message_length(data[8:]) == len(data) - 8
    with struct.from_bytes(data[8:]) as reader:
        return reader.to_dict()


def test_connect_messages() -> None:
    request = quic("quic_connect_request_get", QUIC.ConnectRequest)
    assert (request["dest"], request["type"]) == ("http://example.com/hi?x=1", "http")
    assert request["metadata"][0] == {"key": "HttpMethod", "val": "GET"}
    assert request["metadata"][1] == {"key": "HttpHost", "val": "example.com"}
    assert len(request["metadata"]) == 3
    response = quic("quic_connect_response_200", QUIC.ConnectResponse)
    assert response["metadata"] == [
        {"key": "HttpStatus", "val": "200"},
        {"key": "HttpHeader:Content-Type", "val": "text/plain"},
    ]
    assert quic("quic_connect_response_error", QUIC.ConnectResponse)["error"] == "boom"
    assert not quic("quic_connect_response_tcp_ack", QUIC.ConnectResponse).get("error")
