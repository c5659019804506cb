#!/usr/bin/env bash
# A throwaway PostgreSQL server for the tests, on a free loopback port, in a temporary folder.
#
#   eval "$(scripts/postgres_for_tests.sh start)"    exports HARNESS_TEST_POSTGRES and the folder
#   scripts/postgres_for_tests.sh url                the URL of the running server
#   scripts/postgres_for_tests.sh stop               stops it and removes everything
#
# Where the state is: $HARNESS_POSTGRES_FOR_TESTS, by default ${TMPDIR:-/tmp}/harness-postgres-$UID.
# `start` when it already runs prints the same again. Nothing is durable (fsync off): tests only.
# If PostgreSQL is absent, it is installed with apt-get, which needs root on Debian or Ubuntu; the
# server itself never runs as root.
set -euo pipefail

state=${HARNESS_POSTGRES_FOR_TESTS:-${TMPDIR:-/tmp}/harness-postgres-$(id -u)}
user=harness
database=harness_test
log() { echo "postgres_for_tests: $*" >&2; }
fail() { log "$*"; exit 1; }

# Prints the folder that holds initdb and pg_ctl: the newest Debian one, else what is on the PATH.
find_binaries() {
    local folder newest="" program
    for folder in $(ls -d /usr/lib/postgresql/*/bin /usr/pgsql-*/bin 2>/dev/null | sort -V); do
        [ -x "$folder/initdb" ] && [ -x "$folder/pg_ctl" ] && newest=$folder
    done
    if [ -z "$newest" ] && program=$(command -v initdb) && [ -n "$program" ]; then
        folder=$(dirname "$(readlink -f "$program")")
        [ -x "$folder/pg_ctl" ] && newest=$folder
    fi
    [ -n "$newest" ] && echo "$newest"
}

install_postgres() {
    command -v apt-get >/dev/null ||
        fail "PostgreSQL is not installed and there is no apt-get. Install PostgreSQL 13 or newer (initdb, pg_ctl)."
    [ "$(id -u)" = 0 ] ||
        fail "PostgreSQL is not installed; run this as root once, or: sudo apt-get install postgresql"
    log "installing PostgreSQL with apt-get"
    export DEBIAN_FRONTEND=noninteractive
    local attempt settings=/etc/postgresql-common/createcluster.conf
    for attempt in 1 2 3; do
        # First the common part, to tell it not to make and start a server of its own.
        if apt-get update -qq >&2 &&
            apt-get install -y -qq --no-install-recommends postgresql-common >&2 &&
            { [ ! -f "$settings" ] || sed -ri 's/^#?(create_main_cluster).*$/\1 = false/' "$settings"; } &&
            apt-get install -y -qq --no-install-recommends postgresql >&2; then
            return
        fi
        log "apt-get failed (attempt $attempt of 3)"
        sleep $((attempt * 3))
    done
    fail "could not install PostgreSQL with apt-get"
}

# Runs a command as a user who is not root: initdb and postgres refuse root.
unprivileged() {
    if [ "$(id -u)" != 0 ]; then
        "$@"
    elif command -v runuser >/dev/null; then
        (cd / && runuser -u "$(cat "$state/owner")" -- "$@")
    else
        (cd / && setpriv --reuid="$(cat "$state/owner")" --regid="$(id -g "$(cat "$state/owner")")" --clear-groups "$@")
    fi
}

free_port() {
    if command -v python3 >/dev/null; then
        python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
    else
        echo $((20000 + RANDOM % 12000))
    fi
}

running() {
    [ -f "$state/bin" ] && [ -f "$state/url" ] && [ -d "$state/data" ] &&
        unprivileged "$(cat "$state/bin")/pg_ctl" -D "$state/data" status >/dev/null 2>&1
}

print_environment() {
    echo "export HARNESS_TEST_POSTGRES='$(cat "$state/url")'"
    echo "export HARNESS_POSTGRES_FOR_TESTS='$state'"
}

start() {
    if running; then
        print_environment
        return
    fi
    [ ! -e "$state" ] || stop
    local bin
    bin=$(find_binaries) || true
    if [ -z "$bin" ]; then
        install_postgres
        bin=$(find_binaries) || fail "PostgreSQL was installed, but initdb and pg_ctl are not in /usr/lib/postgresql/*/bin"
    fi
    mkdir -p "$(dirname "$state")"
    mkdir "$state" # fails if somebody else made it meanwhile
    chmod 755 "$state"
    echo "$bin" >"$state/bin"
    if [ "$(id -u)" = 0 ]; then
        id postgres >/dev/null 2>&1 && echo postgres >"$state/owner" || echo nobody >"$state/owner"
    else
        id -un >"$state/owner"
    fi
    local password
    password=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    mkdir "$state/server"
    echo "$password" >"$state/server/password"
    chmod -R go-rwx "$state/server"
    [ "$(id -u)" != 0 ] || chown -R "$(cat "$state/owner")" "$state/server"
    unprivileged test -w "$state/server" || {
        stop
        fail "the unprivileged user may not enter $state; set HARNESS_POSTGRES_FOR_TESTS to a folder under /tmp"
    }
    ln -s server/data "$state/data"
    unprivileged "$bin/initdb" -D "$state/server/data" -U "$user" --pwfile="$state/server/password" \
        --auth=scram-sha-256 --encoding=UTF8 --locale=C.UTF-8 --no-sync >"$state/initdb.log" 2>&1 ||
        { cat "$state/initdb.log" >&2; fail "initdb failed"; }
    local attempt port
    for attempt in 1 2 3 4 5; do # another process may take the port between asking and using
        port=$(free_port)
        if unprivileged "$bin/pg_ctl" -D "$state/server/data" -l "$state/server/log" -w -t 60 start \
            -o "-p $port -c listen_addresses=127.0.0.1 -c unix_socket_directories='' \
                -c fsync=off -c synchronous_commit=off -c full_page_writes=off \
                -c max_connections=100 -c shared_buffers=64MB" >"$state/start.log" 2>&1; then
            echo "postgresql://$user:$password@127.0.0.1:$port/$database" >"$state/url"
            PGPASSWORD=$password "$bin/psql" -q -h 127.0.0.1 -p "$port" -U "$user" -d postgres \
                -c "CREATE DATABASE $database" >&2 || { stop; fail "the database could not be created"; }
            log "PostgreSQL $("$bin/postgres" -V | grep -o '[0-9.]*' | head -1) runs on port $port, in $state"
            print_environment
            return
        fi
        log "start failed on port $port (attempt $attempt of 5)"
    done
    cat "$state/start.log" "$state/server/log" >&2 || true
    stop
    fail "the server could not be started"
}

stop() {
    [ -e "$state" ] || { log "nothing to stop in $state"; return 0; }
    # Only a folder this script made is removed.
    [ -f "$state/bin" ] || fail "$state was not made by this script; remove it yourself"
    if [ -d "$state/data" ]; then
        unprivileged "$(cat "$state/bin")/pg_ctl" -D "$state/server/data" -m immediate -w -t 30 stop \
            >/dev/null 2>&1 || true
    fi
    rm -rf "$state"
}

case "${1:-start}" in
    start) start ;;
    stop) stop ;;
    url) running || fail "no server runs in $state; start one: $0 start"; cat "$state/url" ;;
    *) fail "unknown action '$1'; expected start, url or stop" ;;
esac
