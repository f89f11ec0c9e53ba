//! What a job leaves is not there for the next one, and a pod runs one job whatever its job does.

use anyhow::{Context, Result, ensure};
use mayfly_cluster::command::random_hex;
use mayfly_crds::names::ANNOTATION_JOB;
use mayfly_e2e::stage::{Stage, said, workflow};
use serde_json::json;

/// Jobs that look for what the first one left.
const SEEKERS: usize = 20;

/// Leaves a mark in every folder it can write to, as a process that escaped its parents, and as two open sockets.
const LEAVE: &str = "import os,socket,sys,time
m='mayfly-'+sys.argv[1]; places=0
for d,dirs,_ in os.walk('/'):
    if d=='/': dirs[:]=[x for x in dirs if x not in ('proc','sys')]
    try:
        open(d+'/'+m,'w').write(m); places+=1
    except OSError: pass
if os.fork()==0:
    os.setsid()
    if os.fork(): os._exit(0)
    null=os.open('/dev/null',os.O_RDWR)
    for fd in 0,1,2: os.dup2(null,fd)
    s=socket.socket(socket.AF_UNIX); s.bind(chr(0)+m); t=socket.socket(); t.bind(('0.0.0.0',47474)); t.listen()
    s.set_inheritable(True); t.set_inheritable(True)
    os.execv('/bin/sleep',[m,'3000'])
time.sleep(1)
def there(p):
    try: return m in open(p,errors='replace').read()
    except OSError: return False
print('socket='+str(there('/proc/net/unix')))
print('process='+str(any(there('/proc/'+p+'/cmdline') for p in os.listdir('/proc') if p.isdigit() and int(p)!=os.getpid())))
print('places='+str(places))";
/// Looks for such a mark, given in two halves, everywhere it can read.
const SEEK: &str = "import os,sys
m='mayfly-'+sys.argv[1]+sys.argv[2]; found=[]; looked=0
def look(p):
    global looked
    try:
        if os.path.isfile(p):
            looked+=1
            if m.encode() in open(p,'rb').read(1<<20): found.append(p)
    except OSError: pass
for d,dirs,files in os.walk('/'):
    if d=='/': dirs[:]=[x for x in dirs if x not in ('proc','sys','usr')]
    for name in dirs+files:
        if m in name: found.append(d+'/'+name)
    for name in files: look(d+'/'+name)
for p in os.listdir('/proc'):
    if p.isdigit():
        for what in 'cmdline','environ': look('/proc/'+p+'/'+what)
for p in '/proc/net/unix','/proc/sysvipc/shm','/proc/sysvipc/msg','/proc/mounts': look(p)
if ':B972 ' in open('/proc/net/tcp').read(): found.append('port 47474')
print('looked='+str(looked))
print('found='+str(found))";

fn python(program: &str, arguments: &str) -> String {
    format!("cat > /tmp/program.py <<'E'\n{program}\nE\npython3 /tmp/program.py {arguments}")
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_from_the_last_job() -> Result<()> {
    let stage = Stage::set("last").await?;
    let pool = stage.pool(|_| {}).await?;
    stage.hook()?;
    let mark = random_hex(6)?;
    let jobs = stage.push("app", &[("leave.yml", &workflow("push", &python(LEAVE, &mark)))], 1).await?;
    let log = stage.succeeds("app", jobs[0].id).await?;
    let places: u32 = said(&log, "places=").context("the number of places")?.parse()?;
    let left = [said(&log, "socket="), said(&log, "process=")];
    ensure!(places >= 3 && left == [Some("True"); 2], "the first job left too little:\n{log}");
    stage.nothing_left(&pool).await?;

    // In two halves: no seeker finds the mark in its own script or arguments.
    let (head, tail) = mark.split_at(6);
    let script = python(SEEK, &format!("{head} {tail}"));
    let matrix = json!({"on": "push", "jobs": {"job": {"runs-on": "linux",
        "strategy": {"matrix": {"n": (0..SEEKERS).collect::<Vec<_>>()}}, "steps": [{"run": script}]}}});
    let jobs = stage.push("other", &[("seek.yml", &matrix.to_string())], SEEKERS).await?;
    for job in &jobs {
        let log = stage.succeeds("other", job.id).await?;
        let looked: u32 = said(&log, "looked=").context("how much it looked at")?.parse()?;
        ensure!(looked > 50 && said(&log, "found=") == Some("[]"), "{log}");
    }
    stage.nothing_left(&pool).await?;
    stage.strike().await
}

#[tokio::test(flavor = "multi_thread")]
async fn one_job_only() -> Result<()> {
    let stage = Stage::set("one").await?;
    let pool = stage.pool(|pool| pool["spec"]["scale"]["max"] = json!(1)).await?;
    stage.hook()?;
    // The job does to the runner's process what it may, and starts the runner's program again and again: with what is still there of a
    // registration, it would take the second job into the same pod.
    let hostile = "cd ~; (setsid bash -c 'for i in 1 2 3 4 5 6 7 8; do pkill -9 gitea-runner; \
        gitea-runner daemon --config /etc/gitea-runner.yaml; sleep 1; done' > ~/again.log 2>&1 &); sleep 20; echo again=$(wc -l < ~/again.log)";
    let tell = workflow("workflow_dispatch", "echo host=$(cat /proc/sys/kernel/hostname)");
    let first = stage.push("one", &[("ci.yml", &workflow("push", hostile)), ("second.yml", &tell)], 1).await?;
    let pod =
        stage.a_pod("with the first job", |pod| pod.metadata.annotations.iter().flatten().any(|(key, _)| key == ANNOTATION_JOB)).await?;
    let run = stage.forge.dispatch(&stage.organization.name, "one", "second.yml", "main", &json!({}))?;
    let second = stage.forge.run_jobs(&stage.organization.name, "one", run)?.pop().context("a second job")?;
    let log = stage.succeeds("one", second.id).await?;
    let host = said(&log, "host=").context("where it ran")?;
    ensure!(Some(host) != pod.metadata.name.as_deref(), "two jobs in one pod");
    let log = stage.succeeds("one", first[0].id).await?;
    let again: u32 = said(&log, "again=").context("what the runner's program said")?.parse()?;
    ensure!(again > 0, "the program did not run a second time:\n{log}");
    stage.nothing_left(&pool).await?;
    stage.strike().await
}
