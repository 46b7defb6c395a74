"""Writes HAProxy's configuration: one address, and the devices, each with its key.

A request passes HAProxy twice. The first part knows clients: TLS, keys, the choice of a device, the
log. The second part stands for one device: it adds that device's key, and cuts it off if it is
frozen, and then the first part asks another one. vllm-router, if it chooses, is between the two.
"""

from __future__ import annotations

import json

from edge_make.key_file import KeyEntry

from .config import Device, FleetConfig

KEYS_NAME = "clients.map"
MASTER_NAME = "master.sock"

_GLOBAL = """\
# Written by edge-llm fleet from {source}; the next reload writes it anew.
global
    log stdout format raw local0 info
    maxconn {max_connections}
    localpeer endpoint
    # A body must fit into a buffer to be looked into, and to be sent a second time.
    tune.bufsize 65536
    # After a reload the old process ends its streams; no longer than this.
    hard-stop-after {answer_s}s

defaults
    mode http
    log global
    option dontlognull
    option http-no-delay
    # A device that lost its power is noticed on connections where nothing comes for long.
    option clitcpka
    option srvtcpka
    srvtcpka-idle 20s
    srvtcpka-intvl 5s
    srvtcpka-cnt 3
    timeout http-request 10s
    timeout http-keep-alive 15s
    timeout connect 2s
    timeout queue {queue_s}s
    timeout check 2s
    # A whole answer sends nothing before its end, and a stream at least a comment every 15 s.
    timeout client {answer_s}s
    timeout server {answer_s}s
    # An answer whose client has left ends at its device, too.
    option abortonclose
{errors}
"""

_API = """
# By which the process after a reload learns from the one before where sessions are.
peers own
    bind unix@{state}/peers.sock mode 600
    server endpoint

frontend api
    bind {bind}{tls}
    option http-buffer-request
    log-format '{log}'
    # Found again at the device: its log has the same request id.
    http-request set-var(txn.id) uuid()
    http-request set-var(txn.id) req.hdr(x-request-id) if {{ req.hdr(x-request-id) -m reg ^[A-Za-z0-9._-]{{1,64}}$ }}
    http-request set-header x-request-id %[var(txn.id)]
    http-after-response set-header x-request-id %[var(txn.id)]
    http-request set-var(txn.span) uuid(),regsub(-,,g),bytes(0,16)
    http-request set-var-fmt(txn.trace) "00-%[uuid(),regsub(-,,g)]-%[var(txn.span)]-01"
    http-request set-var(txn.trace) req.hdr(traceparent) if {{ req.hdr(traceparent) -m reg ^[0-9a-f]{{2}}-[0-9a-f]{{32}}-[0-9a-f]{{16}}-[0-9a-f]{{2}}$ }}
    http-request set-header traceparent %[var(txn.trace)]
    http-request set-var(txn.path) path,json(utf8s)
    # Who asks: by key, else by address. What a client says of itself counts for nothing.
    http-request set-var(txn.client) src
{keys}    http-request set-header x-edge-client %[var(txn.client)]
    http-request del-header x-forwarded-for
    option forwardfor
    http-request return status 200 content-type application/json string '{{"status": "ready"}}' if {{ path /ready /health }} {{ nbsrv(devices) gt 0 }}
    http-request return status 503 content-type application/json hdr Retry-After 5 string '{no_device}' if !{{ nbsrv(devices) gt 0 }}
{authorized}    http-request return status 404 content-type application/json string '{not_here}' if {{ path /metrics /stats }}
    # Which requests belong together: a session, or the beginning of the prompt; never across clients.
    http-request set-var(txn.of) req.hdr({header})
    http-request set-var(txn.of) req.body,json_query('$.prompt_cache_key') if !{{ var(txn.of) -m len gt 0 }}
    http-request set-var(txn.of) req.body,json_query('$.user') if !{{ var(txn.of) -m len gt 0 }}
    http-request set-var(txn.next) req.body,json_query('$.messages[1].content') if {{ req.body,json_query('$.messages[0].role') -m str system developer }}
    http-request set-var(txn.of) req.body,json_query('$.messages[0].content'),concat(|,txn.next) if !{{ var(txn.of) -m len gt 0 }}
    http-request set-var(txn.of) req.body,bytes(0,1024) if !{{ var(txn.of) -m len gt 0 }}
    http-request set-var-fmt(txn.affinity) "%[var(txn.client)] %[var(txn.of)]"
    http-request set-var(txn.room) nbsrv(devices),mul({slots}),add({max_queue})
    http-request return status 429 content-type application/json hdr Retry-After 1 string '{full}' if {{ method POST }} {{ be_conn(devices),sub(txn.room) ge 0 }}
    http-response set-var(txn.device) res.hdr(x-edge-device)
{router}    default_backend devices

backend devices
    # A new session goes where least runs, and stays there. A hash would give one device many more
    # sessions than another, and each of them fewer cached prefixes.
    balance leastconn
    stick-table type binary len 20 size 200k expire 2h peers own
    stick on var(txn.affinity),sha1
    option httpchk
    http-check send meth GET uri /ready ver HTTP/1.1 hdr Host localhost
    http-check expect status 200
    # Before the first byte of an answer a request goes to another device: one that refuses the
    # connection, that dies, that drains or loads (503), or whose queue is full (429).
    retries {retries}
    option redispatch 1
    retry-on conn-failure empty-response 429 502 503
    default-server check inter 1s fastinter 250ms downinter 1s fall 2 rise 1 observe layer7 error-limit 3 on-error fastinter
{servers}
"""  # noqa: E501 - HAProxy knows no continued lines

_KEYS = """\
    http-request set-var(txn.key) http_auth_bearer
    http-request set-var(txn.key) req.hdr(x-api-key) unless {{ req.hdr(authorization) -m found }}
    http-request unset-var(txn.client)
    http-request set-var(txn.client) var(txn.key),sha2(256),hex,lower,map({map})
    http-request del-header authorization
    http-request del-header x-api-key
"""

_AUTHORIZED = """\
    http-request return status 401 content-type application/json string '{invalid}' unless {{ var(txn.client) -m found }}
"""  # noqa: E501

_DEVICE = """
listen device-{name}
    bind unix@{socket} mode 600
    no log
    retries 0
{error}
    http-response set-header X-Edge-Device {name}
{key}{check}    # The queue is here: above, a full device would not be tried in place of a dead one.
    server {name} {address} maxconn {slots}{checked}
"""

# Any answer means that the device is alive; without one, nothing more will come from it.
_CHECK = """\
    option httpchk
    http-check send meth GET uri /health ver HTTP/1.1 hdr Host localhost
    http-check expect rstatus ^[2-5]
"""

_ROUTER = """
backend router
    option httpchk GET /liveness
    http-request set-header authorization "Bearer {secret}"
    # It lets pages of every site read answers.
    http-response del-header access-control- -m beg
    server router 127.0.0.1:{router_port} check inter 1s fall 2 rise 1

# What vllm-router sends on: http://127.0.0.1:{back_port}/DEVICE/v1/...
frontend from_router
    bind 127.0.0.1:{back_port}
    no log
    http-request set-var(txn.name) path,field(2,/)
{ready}
    http-request return status 200 if {{ path /ready /health }} {{ nbsrv(devices) gt 0 }}
    http-request return status 404 if {{ path_end /render }}
    http-request return status 200 if {{ path_end /ready /health }} {{ var(txn.up) -m found }}
    http-request return status 503 if {{ path_end /ready /health }}
    http-request return status 401 unless {{ req.hdr(authorization) -m str "Bearer {secret}" }}
    http-request replace-path /[^/]*(/.*) \\1
    http-request set-var(txn.affinity) req.hdr(x-request-id)
    use_backend to-%[var(txn.name)] if {{ var(txn.up) -m found }}
    # The router may go on choosing a device that is away.
    default_backend devices

# Where the device that the router chose has just died: any other one.
frontend any_device
    bind unix@{any} mode 600
    no log
    http-request set-var(txn.affinity) req.hdr(x-request-id)
    default_backend devices
"""

_TO_DEVICE = """
backend to-{name}
    balance roundrobin
    use-server {name} if TRUE
    retries 1
    option redispatch 1
    retry-on conn-failure empty-response 502 503
    server {name} unix@{socket}
    server any unix@{any}
"""

_METRICS = """
frontend metrics
    bind 127.0.0.1:{port}
    no log
    http-request use-service prometheus-exporter if {{ path /metrics }}
    http-request return status 404
"""

# One line for each request, in JSON.
_LOG = (
    '{"time": "%[accept_date,utime(%Y-%m-%dT%H:%M:%SZ)]", "request_id": "%[var(txn.id)]", '
    '"traceparent": "%[var(txn.trace)]", "client": "%[var(txn.client)]", '
    '"device": "%[var(txn.device)]", "method": "%HM", "path": "%[var(txn.path)]", '
    '"status": %ST, "queue_ms": %Tw, "first_byte_ms": %Tr, "total_ms": %Ta, '
    '"retries": "%rc", "end": "%tsc", "bytes": %B}'
)


def configuration(config: FleetConfig, secret: str, source: str) -> str:
    """Write the configuration.

    Args:
        config: the fleet.
        secret: password that the endpoint sends itself through vllm-router.
        source: the fleet's file, for the first line.
    """
    names = list(config.devices)
    state = config.state_dir
    fields = {
        "source": source,
        "state": state,
        "max_connections": max(1024, 6 * (len(names) * config.slots + config.max_queue)),
        "answer_s": config.answer_s,
        "queue_s": config.queue_s,
        "bind": f"{_bracketed(config.host)}:{config.port}",
        "tls": _tls(config.certificate),
        "log": _LOG,
        "errors": "\n".join(_http_error(status, *each) for status, each in _ERRORS.items()),
        "keys": _KEYS.format(map=f"{state}/{KEYS_NAME}") if config.api_key_file else "",
        "authorized": _AUTHORIZED.format(invalid=_INVALID) if config.api_key_file else "",
        "header": config.session_header,
        "no_device": _envelope(503, "no_device", "no device is ready; try again"),
        "not_here": _envelope(404, "not_found", "ask a device, or edge-llm fleet status"),
        "full": _envelope(429, "queue_full", "all devices are busy; try again"),
        "max_queue": config.max_queue,
        "router": _use_router(config),
        "retries": config.retries,
        "slots": config.slots,
        "servers": "\n".join(_server(state, *each) for each in config.devices.items()),
    }
    text = (_GLOBAL + _API).format(**fields)
    text += "".join(_device(config, *each) for each in config.devices.items())
    if config.router_port is not None:
        anywhere = f"{state}/any.sock"
        text += _ROUTER.format(
            any=anywhere,
            secret=secret,
            router_port=config.router_port,
            back_port=config.router_port + 1,
            ready="\n".join(_is_up(name) for name in names),
        )
        for name in names:
            text += _TO_DEVICE.format(name=name, socket=_socket(state, name), any=anywhere)
    if config.metrics_port is not None:
        text += _METRICS.format(port=config.metrics_port)
    return text


def client_map(keys: list[KeyEntry]) -> str:
    """Write the map from a key's hash to its client's name."""
    return "".join(f"{entry.digest.hex()} {entry.name}\n" for entry in keys)


def worker_url(config: FleetConfig, name: str) -> str:
    """Return vllm-router's address for a device: at the endpoint, which adds the device's key."""
    assert config.router_port is not None
    return f"http://127.0.0.1:{config.router_port + 1}/{name}"


def _use_router(config: FleetConfig) -> str:
    """Send only these two paths to the router: on others it passes no headers on."""
    if config.router_port is None:
        return ""
    paths = "/v1/chat/completions /v1/completions"
    return (
        f"    use_backend router if {{ method POST }} {{ path {paths} }} {{ nbsrv(router) gt 0 }}\n"
    )


def _is_up(name: str) -> str:
    known = f"{{ var(txn.name) -m str {name} }} {{ srv_is_up(devices/{name}) }}"
    return f"    http-request set-var(txn.up) int(1) if {known}"


def _socket(state: str, name: str) -> str:
    return f"{state}/device-{name}.sock"


def _server(state: str, name: str, device: Device) -> str:
    host, port = device.probe_address
    return f"    server {name} unix@{_socket(state, name)} addr {host} port {port}"


def _device(config: FleetConfig, name: str, device: Device) -> str:
    key = f'    http-request set-header authorization "Bearer {device.key}"\n'
    probe = ""
    if device.probe_port is not None:
        host, port = device.probe_address
        how = "inter 1s fastinter 500ms downinter 1s fall 2 rise 1"
        probe = f" check addr {host} port {port} {how} on-marked-down shutdown-sessions"
    return _DEVICE.format(
        name=name,
        socket=_socket(config.state_dir, name),
        slots=config.slots,
        error=_http_error(503, *_ERRORS[502]),
        key=key if device.key else "",
        check=_CHECK if probe else "",
        address=device.address,
        checked=probe,
    )


def _bracketed(host: str) -> str:
    plain = host.strip("[]")
    return f"[{plain}]" if ":" in plain else plain


def _tls(certificate: str | None) -> str:
    if certificate is None:
        return ""
    return f" ssl crt {certificate} alpn h2,http/1.1 ssl-min-ver TLSv1.2"


def _http_error(status: int, code: str, message: str, retry_after_s: int | None) -> str:
    after = "" if retry_after_s is None else f" hdr Retry-After {retry_after_s}"
    body = _envelope(status, code, message)
    return f"    http-error status {status} content-type application/json{after} string '{body}'"


def _envelope(status: int, code: str, message: str) -> str:
    """Write an error in OpenAI's form, with nothing that HAProxy would have to quote."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json.dumps({"error": error})


_ERRORS = {
    400: ("invalid_http", "the endpoint could not read the request", None),
    408: ("header_timeout", "the request did not arrive in time", None),
    502: ("device_failed", "the device ended without an answer; try again", 1),
    503: ("queue_timeout", "no device had room in time; try again", 5),
    504: ("answer_timeout", "the device did not answer in the time that is allowed", None),
}
_INVALID = _envelope(
    401,
    "invalid_api_key",
    "no valid API key; send it as Authorization: Bearer KEY or as x-api-key: KEY",
)
