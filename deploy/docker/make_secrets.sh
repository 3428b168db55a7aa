#!/bin/sh
# Makes what is not there yet in /run/secrets (or the folder given): nothing in these images and files has a password of its own.
#   keys.yaml          hashed API keys of the gateway (`distill keys add NAME` adds more)
#   metrics_key        the key by which Prometheus reads the gateway's metrics
#   ray_token          what Ray's processes and the trainer show each other
#   grafana_password   of Grafana's user admin
set -eu
umask 027
cd "${1:-/run/secrets}"

random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

# Written beside its place and renamed: a start that was cut short leaves no half secret.
keep() {
  [ -s "$1" ] && return
  cat > "$1.partial"
  [ -s "$1.partial" ]
  mv "$1.partial" "$1"
  echo "made $1"
}

random | keep ray_token
random | keep grafana_password
if [ ! -s metrics_key ]; then
  distill keys revoke prometheus --keys-file keys.yaml 2>/dev/null || true
  distill keys add prometheus --keys-file keys.yaml | keep metrics_key
  chmod 640 keys.yaml
fi
