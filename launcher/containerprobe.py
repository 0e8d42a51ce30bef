"""What a broker image is and whether its volume can be written: one run of it before anything else.

Owns: the script, the meaning of its lines.
In: the script's output. Out: a `Dialect`; StackError in one line.
Never: runs anything (containers.py does).
"""

from __future__ import annotations

from launcher.brokerconf import Dialect
from launcher.containerspec import data_volume
from launcher.stackdir import Settings, StackError

PROBE = r"""
PATH="$PATH:/usr/sbin:/usr/local/sbin"
mosquitto -h 2>&1 | sed -n 's/.*mosquitto version /version /p' | head -n 1
for d in /usr/lib /usr/lib64 /usr/local/lib /usr/lib/*-linux-gnu; do
  if [ -f "$d/mosquitto_password_file.so" ] && [ -f "$d/mosquitto_acl_file.so" ]; then echo "plugins $d"; break; fi
done
command -v mosquitto_rr >/dev/null || echo "lacks mosquitto_rr"
f=/mosquitto/data/.probe-$HOSTNAME
if said=$( { head -c 65536 /dev/zero >$f && rm $f; } 2>&1 ); then
  echo writable
else
  rm -f $f; echo "unwritable $said"
fi
if [ -f /mosquitto/config/candidate.conf ]; then
  sed 's/^persistence .*/persistence false/' /mosquitto/config/candidate.conf >/tmp/candidate.conf
  if mosquitto -h 2>&1 | grep -q test-config; then
    said=$(mosquitto -c /tmp/candidate.conf --test-config 2>&1); code=$?
  else
    said=$(timeout 1 mosquitto -c /tmp/candidate.conf 2>&1); code=$?
    case $code in 124|143) code=0;; esac
  fi
  echo "candidate $code"
  echo "$said" | grep -i -E 'error|unable|invalid|unknown' | head -n 3 | sed 's/^/said /'
fi
"""
"""Run once in the broker's image as the broker's user, with its volumes: what is it, can it write, is the new
configuration good. 2.1's --test-config saves an empty database when it ends, hence `persistence false` for it."""


def understand(lines: list[str], settings: Settings) -> Dialect:
    """What PROBE's lines mean; StackError for what would keep the broker from working."""
    facts = [line.partition(" ")[::2] for line in lines if line]
    said = dict(reversed(facts))
    complaints = [rest for word, rest in facts if word == "said"]
    image, volume = settings.broker_image, data_volume(settings)
    parts = said.get("version", "").split()[:1]
    numbers = parts[0].split(".") if parts else []
    if len(numbers) != 3 or not all(number.isdigit() for number in numbers):
        shown = "; ".join(lines[-3:])[:300]
        raise StackError(f"{image} holds no Mosquitto that tells its version: {shown}", advice="see --broker-image")
    dialect = Dialect((int(numbers[0]), int(numbers[1]), int(numbers[2])), said.get("plugins", ""))
    if dialect.version < (2, 0, 0):
        raise StackError(f"{image} holds Mosquitto {dialect}: 2.0 is needed", advice="see --broker-image")
    if "lacks" in said:
        raise StackError(f"{image} has no {said['lacks']}, which the health check needs", advice="see --broker-image")
    if "unwritable" in said:
        why = said["unwritable"].rpartition(": ")[2] or "it cannot be written"
        full = "no space" in why.lower()
        advice = (
            "its disk is full: make room, then run `launcher up` again"
            if full
            else f"give it to the broker's user: docker run --rm -u 0 -v {volume}:/d {image} chown -R 1883:1883 /d"
        )
        raise StackError(f"the broker cannot write to the volume {volume}: {why}", advice=advice)
    if said.get("candidate", "0") != "0":
        raise StackError(
            f"Mosquitto {dialect} refuses that configuration: {'; '.join(complaints) or 'it ends at once'}",
            advice="mend the file given with --config; the running broker was not touched",
        )
    return dialect
