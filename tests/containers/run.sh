#!/usr/bin/env bash
# run.sh [pytest arguments]: a throw-away Docker engine in namespaces of its own, stand-ins for the public base images
# made from Debian packages, this project's real Dockerfile, and tests/containers against them. Leaves nothing behind.
#
# KEEP=DIR keeps engine data and downloads there for the next run. SKIP_BUILD=1 takes the image that KEEP has.
# REPRODUCE=1 builds it a second time without a cache and compares the layers.
# Needs root and apt (installs docker.io, mmdebstrap, ... when missing); elsewhere it says so and ends with status 0.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
BEGUN=$(date +%s)
say() { printf 'test-containers: [%3ds] %s\n' "$(( $(date +%s) - BEGUN ))" "$*"; }
skip() { printf '\n*** test-containers: SKIPPED, NOTHING WAS TESTED: %s ***\n\n' "$*" >&2; exit 0; }

[ "$(uname -s)" = Linux ] || skip "needs Linux"
[ "$(id -u)" = 0 ] || skip "needs root, to run a Docker engine in namespaces of its own"
command -v apt-get >/dev/null || skip "needs apt, to make images from Debian packages"
unshare --net --mount --pid --fork --mount-proc true 2>/dev/null || skip "this machine allows no namespaces"

W=${KEEP:-$(mktemp -d /tmp/test-containers.XXXXXX)}
mkdir -p "$W"
export E=$W/engine DOCKER_CONFIG=$W/docker-config
mkdir -p "$E" "$DOCKER_CONFIG/cli-plugins"

engine_start() {
  rm -f "$E"/*.pid "$E"/*.sock
  # Killing the first process of the pid namespace ends the engine and every container, whatever happened before.
  unshare --net --mount --pid --fork --kill-child --mount-proc --propagation private \
    sh -c "ip link set lo up; exec tini -s -- dockerd --host=unix://$E/docker.sock --data-root=$E/data \
      --exec-root=$E/exec --pidfile=$E/docker.pid --storage-driver=overlay2" >"$E/dockerd.log" 2>&1 </dev/null &
  UNSHARE=$!
  INIT=
  for _ in $(seq 200); do INIT=$(pgrep -P "$UNSHARE" || true); [ -n "$INIT" ] && break; sleep .05; done
  [ -n "$INIT" ] || { cat "$E/dockerd.log" >&2; return 1; }
  echo "$INIT" >"$E/init.pid"
  for _ in $(seq 600); do
    [ "$(curl -s --unix-socket "$E/docker.sock" http://d/_ping)" = OK ] && return 0
    kill -0 "$UNSHARE" 2>/dev/null || break
    sleep .05
  done
  tail -20 "$E/dockerd.log" >&2
  return 1
}

online() {  # a way out of the namespace, for the package registries that the build needs
  slirp4netns --configure --mtu=1400 --disable-host-loopback "$INIT" tap0 >"$E/slirp.log" 2>&1 </dev/null &
  SLIRP=$!
}

finish() {
  local status=$?
  trap - EXIT INT TERM
  [ -z "${SLIRP:-}" ] || kill "$SLIRP" 2>/dev/null || true
  if [ -n "${INIT:-}" ] && kill -0 "$INIT" 2>/dev/null; then
    kill -TERM "$INIT" 2>/dev/null || true
    for _ in $(seq 100); do kill -0 "$INIT" 2>/dev/null || break; sleep .1; done
    kill -KILL "$INIT" 2>/dev/null || true
  fi
  for d in /sys/fs/cgroup/*/docker; do
    [ ! -d "$d" ] || find "$d" -depth -type d -exec rmdir {} + 2>/dev/null || true
  done
  [ -n "${KEEP:-}" ] || rm -rf "$W" || true
  say "ends with status $status"
  exit "$status"
}
trap finish EXIT INT TERM

# Packages. policy-rc.d keeps apt from starting an engine of its own.
NEEDED=()
for pair in dockerd:docker.io slirp4netns:slirp4netns tini:tini mmdebstrap:mmdebstrap curl:curl ip:iproute2 \
            iptables:iptables pgrep:procps mosquitto:mosquitto; do
  PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null || NEEDED+=("${pair##*:}")
done
export PATH=$PATH:/usr/sbin:/sbin DEBIAN_FRONTEND=noninteractive
if [ ${#NEEDED[@]} -gt 0 ]; then
  say "installing ${NEEDED[*]}"
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; OURS=1
  fi
  apt-get install -y -qq --no-install-recommends "${NEEDED[@]}" >"$W/apt.log" 2>&1 ||
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${NEEDED[@]}" >"$W/apt.log" 2>&1; } ||
    { tail -5 "$W/apt.log" >&2; [ -z "${OURS:-}" ] || rm -f /usr/sbin/policy-rc.d; skip "apt cannot install ${NEEDED[*]}"; }
  [ -z "${OURS:-}" ] || rm -f /usr/sbin/policy-rc.d
fi

suite() { . /etc/os-release; echo "$VERSION_CODENAME"; }
mirror() {
  [ -n "$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -1)" ] || apt-get update -qq
  apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Release: $(suite)" | head -1
}
MIRROR=$(mirror)

# docker compose and buildx, from the next Debian suite, extracted and not installed.
plugins() {
  local a=$W/plugins
  [ ! -e "$a/x/usr/libexec/docker/cli-plugins/docker-compose" ] || return 0
  mkdir -p "$a"/{lists/partial,cache/archives/partial,x,d}
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $MIRROR trixie main" >"$a/sources.list"
  local o="-qq -o Dir::Etc::SourceList=$a/sources.list -o Dir::Etc::SourceParts=/dev/null -o Dir::State::Lists=$a/lists"
  o="$o -o Dir::Cache=$a/cache -o APT::Sandbox::User=root"
  apt-get $o update >/dev/null 2>&1 && (cd "$a/d" && apt-get $o download docker-compose docker-buildx >/dev/null 2>&1 &&
    for f in *.deb; do dpkg -x "$f" "$a/x"; done)
  rm -rf "$a/lists" "$a/d" "$a/cache"
}

# The interpreter of the test environment becomes python:3.13-slim; Debian's own comes as packages.
PREFIX=$("$PYTHON" -c 'import sys; print(sys.base_prefix)')
EXTRA=; [ "$PREFIX" != /usr ] || EXTRA=,python3,python3-venv,python3-pip
base() {
  [ ! -s "$W/base.tar" ] || return 0
  local include=ca-certificates,netbase,tzdata,libssl3,libffi8,libsqlite3-0,libreadline8,libncursesw6,libbz2-1.0
  TMPDIR=$([ -w /dev/shm ] && echo /dev/shm || echo /tmp) mmdebstrap --quiet --format=tar --mode=root --variant=minbase \
    --include="$include,liblzma5,libuuid1,libexpat1,mosquitto,mosquitto-clients$EXTRA" \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' "$(suite)" "$W/base.tar.new" "deb $MIRROR $(suite) main" 2>"$W/base.log" ||
    { tail -5 "$W/base.log" >&2; return 1; }
  mv "$W/base.tar.new" "$W/base.tar"
}
plugins & PLUGINS=$!
base & BASE=$!
mkdir -p "$W/python" "$W/mosquitto"
if [ "$PREFIX" != /usr ] && [ ! -s "$W/python/python.tar" ]; then
  tar -C "$PREFIX" --exclude='*/test' --exclude='*/tests' --exclude='*/idlelib' --exclude='*/__pycache__' \
    --exclude='*.a' --exclude='*/turtledemo' --exclude='*/config-3*' --exclude='*/tkinter' --exclude='*.pth' \
    --exclude='*/site-packages/[!p]*' -cf "$W/python/python.tar" bin lib
fi
wait $PLUGINS || say "docker compose cannot be had: its tests will say so"
wait $BASE
for p in compose buildx; do
  ln -sf "$W/plugins/x/usr/libexec/docker/cli-plugins/docker-$p" "$DOCKER_CONFIG/cli-plugins/"
done
say "base made, $(du -m "$W/base.tar" | cut -f1) MB"

engine_start
export DOCKER_HOST=unix://$E/docker.sock
say "engine $(docker version -f '{{.Server.Version}}, API {{.Server.APIVersion}}')"
docker image inspect debian-base:test >/dev/null 2>&1 ||
  docker import -c 'CMD ["bash"]' "$W/base.tar" debian-base:test >/dev/null
if ! docker image inspect eclipse-mosquitto:2.1.2 >/dev/null 2>&1; then
  cp "$ROOT/tests/containers/Dockerfile.mosquitto" "$W/mosquitto/Dockerfile"
  docker build -q -t eclipse-mosquitto:2.1.2 -t eclipse-mosquitto:latest "$W/mosquitto" >/dev/null
fi
if ! docker image inspect python:3.13-slim >/dev/null 2>&1; then
  if [ "$PREFIX" = /usr ]; then
    printf 'FROM debian-base:test\nRUN python3 -m venv --help >/dev/null && pip --version\nCMD ["python3"]\n' >"$W/python/Dockerfile"
  else
    cp "$ROOT/tests/containers/Dockerfile.python" "$W/python/Dockerfile"
  fi
  docker build -q -t python:3.13-slim "$W/python" >/dev/null
fi
say "stand-ins for eclipse-mosquitto and python made"
if [ -z "${SKIP_BUILD:-}" ]; then
  online
  TAG=tunnel-connector:$("$PYTHON" -c 'import launcher.stackdir as s; print(s.CONNECTOR_IMAGE.partition(":")[2])')
  (cd "$ROOT" && docker build -t "$TAG" . >"$W/build.log" 2>&1) || { tail -30 "$W/build.log" >&2; exit 1; }
  if [ -n "${REPRODUCE:-}" ]; then
    one=$(docker image inspect -f '{{json .RootFS.Layers}}' "$TAG")
    (cd "$ROOT" && docker build --no-cache -t reproduced:test . >"$W/build2.log" 2>&1) || { tail -30 "$W/build2.log" >&2; exit 1; }
    two=$(docker image inspect -f '{{json .RootFS.Layers}}' reproduced:test)
    [ "$one" = "$two" ] || { printf 'test-containers: two builds differ:\n%s\n%s\n' "$one" "$two" >&2; exit 1; }
    say "built again without a cache: the same layers"
  fi
  kill "$SLIRP"; SLIRP=   # from here on nothing can leave the namespace
  say "image $TAG built: $(docker image inspect -f '{{.Size}}' "$TAG" | awk '{printf "%d MB", $1 / 1e6}')"
fi
[ $# -gt 0 ] || set -- -n 3 --dist=loadfile  # most of the time is waiting
cd "$ROOT"
CONTAINER_ENGINE=$E nsenter -t "$INIT" -n -- "$PYTHON" -m pytest tests/containers --timeout 180 "$@"
