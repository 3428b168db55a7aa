#!/bin/sh
# Makes what is not there yet below /run/make-secrets (or the folder given): nothing in these images and files has a password of its own.
# Each lies on a volume of its own, which its readers mount at /run/secrets: nobody reads what is for somebody else.
#   gateway/keys.yaml          hashed API keys of the gateway (`distill keys add NAME` adds more)
#   metrics/metrics_key        the key by which Prometheus reads the gateway's metrics
#   ray/ray_token              what Ray's processes and the trainer show each other
#   grafana/grafana_password   of Grafana's user admin
set -eu
umask 027
if [ "$(id -u)" = 0 ] && [ -z "${1:-}" ]; then
  echo "DISTILL_UID is 0: containers do not run as root; leave it at 1000 (and give ./runs to that user)" >&2
  exit 2
fi
cd "${1:-/run/make-secrets}"

random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

# Written beside its place and renamed: a start that was cut short leaves no half secret.
keep() {
  [ -s "$1" ] && return
  cat > "$1.partial"
  [ -s "$1.partial" ]
  mv "$1.partial" "$1"
  echo "made $1"
}

mkdir -p gateway metrics ray grafana
random | keep ray/ray_token
random | keep grafana/grafana_password
if [ ! -s metrics/metrics_key ]; then
  distill keys revoke prometheus --keys-file gateway/keys.yaml 2>/dev/null || true
  distill keys add prometheus --keys-file gateway/keys.yaml | keep metrics/metrics_key
  chmod 640 gateway/keys.yaml
fi
