#!/bin/sh
# Two hosts on this machine: network namespaces diva-a (10.77.0.1) and diva-b (10.77.0.2), joined by a pair of veth.
# two_hosts.sh up | down. Needs root, or CAP_SYS_ADMIN and CAP_NET_ADMIN, and iproute2.
set -eu
down() {
    for name in diva-a diva-b; do
        if ip netns list | grep -q "^$name\b"; then ip netns delete "$name"; fi
    done
}
case "$1" in
down) down ;;
up)
    down
    ip netns add diva-a
    ip netns add diva-b
    ip link add to-b netns diva-a type veth peer name to-a netns diva-b
    ip -n diva-a address add 10.77.0.1/24 dev to-b
    ip -n diva-b address add 10.77.0.2/24 dev to-a
    for name in diva-a diva-b; do ip -n "$name" link set lo up; done
    ip -n diva-a link set to-b up
    ip -n diva-b link set to-a up
    ;;
esac
