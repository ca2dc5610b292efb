#!/bin/bash
# A real SLURM of N nodes on this machine, without cgroups, systemd or a database: cluster.sh up|down FOLDER [NODES]
# As root. Writes FOLDER/slurm.conf, which SLURM_CONF has to name. Needs Debian's slurm-wlm and munge (several slurmd).
set -euo pipefail
what=$1 D=$2 NODES=${3:-2} CPUS=8
H=$(hostname -s)
LAST=$((NODES - 1))
export SLURM_CONF=$D/slurm.conf
pids() { cat "$D"/*.pid 2>/dev/null || true; }
if [ "$what" = down ]; then
  for pid in $(pids); do kill "$pid" 2>/dev/null || true; done
  [ -e "$D/munged" ] && kill "$(cat "$D/munged")" 2>/dev/null || true
  exit 0
fi
mkdir -p "$D"/{state,log} /run/munge /var/log/munge /var/lib/munge
chown munge:munge /run/munge /var/log/munge /var/lib/munge
chmod 0755 /run/munge
if ! munge -n >/dev/null 2>&1; then
  runuser -u munge -- /usr/sbin/munged
  for _ in $(seq 50); do munge -n >/dev/null 2>&1 && break || sleep .2; done
  cp /run/munge/munged.pid "$D/munged"
fi
cat >"$D/slurm.conf" <<C
ClusterName=ftptest
SlurmctldHost=$H
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
SlurmctldPort=${PORT:-16817}
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool.%n
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=5
SlurmdParameters=config_overrides
$(for i in $(seq 0 $LAST); do echo "NodeName=n$i NodeHostname=$H NodeAddr=127.0.0.1 Port=$((17101 + i)) CPUs=$CPUS State=UNKNOWN"; done)
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
C
slurmctld -i -c -f "$SLURM_CONF"
for i in $(seq 0 $LAST); do
  mkdir -p "$D/spool.n$i"
  slurmd -c -f "$SLURM_CONF" -N "n$i"
done
for _ in $(seq 60); do [ "$(sinfo -h -N -o %t | grep -c idle)" = "$NODES" ] && exit 0 || sleep .5; done
echo "the nodes did not come up:" >&2 && sinfo >&2 && exit 1
