#!/bin/bash
# setup.sh DIR: put the Autobahn WebSocket test suite under DIR, ready to run as DIR/wstest.
#
# The suite is Python 2 to this day. Its interpreter comes from the last Debian suite that has one, fetched with apt and
# a private state, extracted and not installed: nothing on this machine changes. Its libraries are those that the suite
# pins. Needs Linux on x86-64, apt and Python 3 with pip; takes a minute. Exits 3 with a line where that is not there.
set -euo pipefail
dir=$(mkdir -p "$1" && cd "$1" && pwd)
python3=${PYTHON:-python3}
[ -x "$dir/wstest" ] && exit 0
if ! command -v apt-get >/dev/null || [ "$(uname -m)" != x86_64 ]; then
  echo "autobahn: no apt on x86-64 here, so no Python 2 for the suite" >&2
  exit 3
fi
rm -rf "$dir"
apt=$dir/apt
mkdir -p "$apt"/{lists/partial,cache/archives/partial,deb} "$dir/tree"
host=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep '/debian/*$' | head -1)
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $host bullseye main" >"$apt/sources.list"
get=(apt-get -qq -o "Dir::Etc::SourceList=$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
     -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root
     -o Acquire::Check-Valid-Until=false)
"${get[@]}" update
(cd "$apt/deb" && "${get[@]}" download \
  python2.7 python2.7-minimal libpython2.7-minimal libpython2.7-stdlib libssl1.1 libffi7 >/dev/null)
for package in "$apt"/deb/*.deb; do dpkg -x "$package" "$dir/tree"; done
rm -rf "$apt"

cat >"$dir/python2" <<END
#!/bin/sh
export LD_LIBRARY_PATH="$dir/tree/usr/lib/x86_64-linux-gnu" PYTHONHOME="$dir/tree/usr" PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH="$dir/site" PYTHONNOUSERSITE=1
exec "$dir/tree/usr/bin/python2.7" "\$@"
END
chmod +x "$dir/python2"

# The last pip that knows Python 2, run by Python 2 itself: so sdists get their build steps from the right interpreter.
"$python3" -m pip download -q --no-deps --disable-pip-version-check -d "$dir/pip" 'pip==20.3.4' 'wheel==0.37.1'
"$python3" -m pip download -q --no-deps --disable-pip-version-check -d "$dir/pip" \
  --python-version 27 --implementation py --abi none --platform any --only-binary :all: 'setuptools==44.1.1'
mkdir -p "$dir/site"
for wheel in "$dir"/pip/*.whl; do "$python3" -m zipfile -e "$wheel" "$dir/site"; done
"$dir/python2" -m pip install -q --disable-pip-version-check --no-warn-script-location --no-build-isolation --no-deps \
  --target "$dir/suite" -r "$(dirname "$0")/requirements.txt" 2>"$dir/pip.log" || { cat "$dir/pip.log" >&2; exit 1; }
touch "$dir/suite/zope/__init__.py"  # a namespace by .pth file, which only site-packages has read
sed -i "s|$dir/site\"|$dir/suite:$dir/site\"|" "$dir/python2"
cat >"$dir/wstest" <<END
#!/bin/sh
exec "$dir/python2" -c 'from autobahntestsuite.wstest import run; run()' "\$@"
END
chmod +x "$dir/wstest"
"$dir/wstest" --help >/dev/null
