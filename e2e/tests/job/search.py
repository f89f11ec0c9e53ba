"""A hostile job that looks through everything it can read for what should not be there.

    python3 search.py WANTED        WANTED: JSON {"needles": {kind: [text, ..]}, "canaries": {kind: text}}, masked

It says, a line each: `found=KIND | PLACE | DIGEST`, `canary=KIND | PLACE` for what it hid itself beforehand, and what it could do
and how far it came. What it looks for is nowhere in plain text but in its own memory, which alone is not searched; so whatever else has
it, had it before.
"""
import base64, ctypes, hashlib, json, os, re, secrets, select, socket, stat, struct, subprocess, sys, threading, time

MASK, CHUNK, OVERLAP = 0x5A, 4 << 20, 8 << 10
MOST_OF_A_FILE, MOST_OF_A_REGION, MOST_OF_A_PROCESS, MOST_FILES = 256 << 20, 64 << 20, 512 << 20, 200_000
A_PROGRAM = 1 << 20
BEGAN = time.monotonic()
ENDS = BEGAN + 320
ME, RUNNER = os.getpid(), 1
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
GIVEN = ('GITHUB_TOKEN', 'GITEA_TOKEN', 'ACTIONS_RUNTIME_TOKEN', 'ACTIONS_ID_TOKEN_REQUEST_TOKEN', 'TOKEN_ASKED_FOR')
DEVICES = {'null', 'zero', 'full', 'random', 'urandom', 'tty', 'ptmx', 'console'}

PEERS, LISTENING = set(), set()
needles, canaries, holders, found, hidden, looked = {}, {}, {}, {}, set(), {}


def masked(data): return bytes(byte ^ MASK for byte in data)
def add(kind, text): needles.setdefault(kind, set()).add(text if isinstance(text, bytes) else text.encode())
def count(what, amount=1): looked[what] = looked.get(what, 0) + amount


# Shapes: kind, a text that has to be there, and the whole. None of them matches its own source.
SHAPES = [
    ('token', b'eyJ', re.compile(rb'eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}')),
    ('private key', b'PRIVATE KEY-----', re.compile(rb'-----BEGIN [A-Z ]*PRIVATE KEY-----(?:\s|\\n)+[A-Za-z0-9+/=]{40,}')),
    ('kubeconfig', b'-data: ', re.compile(rb'client-(?:key|certificate)-data: [A-Za-z0-9+/=]{16,}')),
    ('variables of the cluster', b'KUBERNETES_', re.compile(rb'KUBERNETES_[A-Z0-9_]+=[0-9a-z]')),
    ("the pod's UID", b'/pods/', re.compile(rb'/pods/[0-9a-f-]{36}/')),
]
# What names the runner at the forge: only in its own memory can it be known how it looks.
REGISTRATION = re.compile(rb'(?:"token"\s*:\s*"|[Xx]-[Rr]unner-[Tt]oken: )([0-9a-f]{40})|'
                          rb'(?:"uuid"\s*:\s*"|[Xx]-[Rr]unner-[Uu]uid: )([0-9a-f-]{36})')


def hit(kind, value, place, pid=None):
    # The end of a copy may be cut off.
    if any(value.startswith(canary) or canary.startswith(value) for canary in canaries.get(kind, ())):
        hidden.add(f'{kind} | {place}' + (f' of {holders[pid]}' if pid in holders else ''))
        return
    whose = '' if pid is None else ' of the runner' if pid == RUNNER else ' of a step'
    found.setdefault(f'{kind} | {place}{whose}', hashlib.sha256(value).hexdigest()[:12])


def look(data, place, pid=None, older=False):
    """In what is older than the pod nothing of the pod's own can be, but keys and tokens of all kinds."""
    count('bytes', len(data))
    for kind, values in [] if older else needles.items():
        for value in values:
            at = data.find(value)
            # An address may be the beginning of a longer one.
            while at >= 0 and value[-1:].isdigit() and value.count(b'.') == 3 and data[at + len(value):at + len(value) + 1].isdigit():
                at = data.find(value, at + 1)
            if at >= 0:
                hit(kind, value, place, pid)
    for kind, mark, shape in SHAPES:
        if mark in data:
            for match in shape.finditer(data):
                value = match.group()
                if kind == 'token':
                    value = token(value)
                if value is not None:
                    hit(kind, value, place, pid)


def token(text):
    """A token by what was signed; None for one that is known under another name or that is none."""
    signed = text.rsplit(b'.', 1)[0]
    for values in (value for kind, value in needles.items() if kind == "the job's token"):
        if any(value.startswith(signed) for value in values):
            return None
    try:
        header = text.split(b'.')[0]
        return signed if b'"alg"' in base64.urlsafe_b64decode(header + b'=' * (-len(header) % 4)) else None
    except ValueError:
        return None


def place_of(path):
    """A path without what differs from pod to pod."""
    path = re.sub(r'[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{12,}', '*', path)
    return 'file ' + re.sub(r'/\d+(?=/|$)', '/*', re.sub(r'\.so(\.\d+)+$', '.so', path))


def read(path, place, pid=None, older=False):
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        count('denied')
        return
    try:
        before, size = b'', 0
        while size < MOST_OF_A_FILE and time.monotonic() < ENDS:
            data = os.read(fd, CHUNK)
            if not data:
                break
            look(before + data, place, pid, older)
            before, size = data[-OVERLAP:], size + len(data)
    except OSError:
        pass
    finally:
        os.close(fd)
    count('files')


def files(top, skip):
    image = os.stat('/').st_dev
    for folder, folders, names in os.walk(top):
        if time.monotonic() > ENDS or looked.get('files', 0) > MOST_FILES:
            count('unfinished')
            return
        folders[:] = [name for name in folders if os.path.join(folder, name) not in skip and not (folder == '/proc' and name.isdigit())]
        for name in names:
            path = os.path.join(folder, name)
            if path in skip:
                continue
            look(path.encode(errors='replace'), place_of(folder) + ' (a name in it)')
            try:
                state = os.lstat(path)
            except OSError:
                continue
            mode = state.st_mode
            if stat.S_ISREG(mode):
                # A large file of the image, which no pod can write, is a program or a library.
                read(path, place_of(path), older=state.st_dev == image and state.st_size > A_PROGRAM)
            elif stat.S_ISLNK(mode):
                look(os.readlink(path).encode(errors='replace'), place_of(path))
            elif stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode):
                hit('socket or pipe', path.encode(), place_of(path))
            # What is masked is the null device.
            elif (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)) and name not in DEVICES and not path.startswith('/dev/pts/') and (
                    state.st_rdev != os.stat('/dev/null').st_rdev):
                hit('device', path.encode(), place_of(path))


def regions(pid):
    try:
        lines = open(f'/proc/{pid}/maps').read().splitlines()
    except OSError:
        count('denied')
        return
    for line in lines:
        bounds, rights, _, _, inode, *name = line.split(maxsplit=5)
        name = name[0] if name else ''
        # What is mapped from a file and cannot be written is that file, which is read as such.
        if rights[0] != 'r' or name in ('[vvar]', '[vvar_vclock]', '[vdso]', '[vsyscall]') or (
                inode != '0' and rights[1] != 'w' and 'deleted' not in name):
            continue
        yield [int(bound, 16) for bound in bounds.split('-')]


def memory(pid, see):
    try:
        mem = os.open(f'/proc/{pid}/mem', os.O_RDONLY)
    except OSError:
        count('denied')
        return
    total = 0
    for start, end in regions(pid):
        end = min(end, start + MOST_OF_A_REGION)
        before = b''
        while start < end and total < MOST_OF_A_PROCESS and time.monotonic() < ENDS:
            try:
                data = os.pread(mem, min(CHUNK, end - start), start)
            except OSError:
                break
            if not data:
                break
            # Much of a memory was never written.
            if data.strip(b'\0'):
                see(before + data)
            before, start, total = data[-OVERLAP:], start + len(data), total + len(data)
    os.close(mem)
    count('memory', total)


def process(pid):
    for what in 'environ', 'cmdline', 'maps', 'mountinfo', 'cgroup', 'status':
        name = {'environ': 'environment', 'cmdline': 'arguments', 'maps': 'mapped files', 'mountinfo': 'mounts'}.get(what, what)
        read(f'/proc/{pid}/{what}', name, pid=pid)
    for link in 'root', 'cwd', 'exe':
        try:
            look(os.readlink(f'/proc/{pid}/{link}').encode(), link, pid)
        except OSError:
            count('denied')
    try:
        here, there = os.stat('/'), os.stat(f'/proc/{pid}/root/')
        if (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
            hit('another root', b'root', 'root', pid)
    except OSError:
        count('denied')
    own = {os.fstat(fd).st_ino for fd in (0, 1, 2)}
    try:
        fds = os.listdir(f'/proc/{pid}/fd')
    except OSError:
        fds = []
        count('denied')
    for fd in fds:
        path = f'/proc/{pid}/fd/{fd}'
        try:
            look(os.readlink(path).encode(errors='replace'), 'open file', pid)
            state = os.stat(path)
        except OSError:
            continue
        if stat.S_ISREG(state.st_mode):
            read(path, 'open file', pid=pid)
        elif stat.S_ISFIFO(state.st_mode) and state.st_ino not in own and pid != ME and reads(pid, fd):
            drain(path, pid)
    if pid != ME:
        memory(pid, lambda data: look(data, 'memory', pid))
    count('processes')


def reads(pid, fd):
    flags = re.search(r'flags:\s*(\d+)', open(f'/proc/{pid}/fdinfo/{fd}').read())
    return flags and int(flags.group(1), 8) & os.O_ACCMODE == os.O_RDONLY


def drain(path, pid):
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        count('denied')
        return
    if select.select([fd], [], [], 0)[0]:
        try:
            look(os.read(fd, 64 << 10), 'pipe', pid)
        except OSError:
            pass
    os.close(fd)


def network():
    for line in open('/proc/net/unix').read().splitlines()[1:]:
        name = line.split(maxsplit=7)[7:]
        if name and name[0].startswith('@'):
            look(name[0].encode(), 'abstract socket')
            if not any(value in name[0].encode() for values in canaries.values() for value in values):
                hit('abstract socket', name[0].encode(), 'network namespace')
    for peer in sorted(PEERS):
        print('peer=' + peer)
    print('listening=' + str(sorted(LISTENING)))


def connections():
    """All connections of the pod, its gate's included, as often as can be; those that get no answer are what the gate proves."""
    while True:
        for table in 'tcp', 'tcp6':
            for line in open(f'/proc/net/{table}').read().splitlines()[1:]:
                (local, port), (remote, remote_port), state = *(side.split(':') for side in line.split()[1:3]), line.split()[3]
                if state == '01':
                    PEERS.add(f'{address(remote)}:{int(remote_port, 16)}')
                elif state == '02':
                    hit('addresses that the gate tries', b'tried', 'connections of the pod')
                elif state == '0A':
                    LISTENING.add(int(port, 16))
        time.sleep(0.05)


def address(text):
    raw = b''.join(struct.pack('<I', int(text[at:at + 8], 16)) for at in range(0, len(text), 8))
    if len(raw) == 16 and raw.startswith(b'\0' * 10 + b'\xff\xff'):
        raw = raw[12:]
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def outcome(result): return 'yes' if result >= 0 else os.strerror(ctypes.get_errno())


def rights():
    """What the kernel lets it do to the runner's process, and with keyrings."""
    class Piece(ctypes.Structure):
        _fields_ = [('base', ctypes.c_void_p), ('size', ctypes.c_size_t)]
    start = next(regions(RUNNER), [0])[0]
    buffer = ctypes.create_string_buffer(64)
    here, there = Piece(ctypes.addressof(buffer), 64), Piece(start, 64)
    print('process_vm_readv=' + outcome(LIBC.process_vm_readv(RUNNER, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)))
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        # PTRACE_SEIZE stops nothing, and ends with the tracer.
        print('ptrace=' + outcome(LIBC.ptrace(0x4206, RUNNER, None, None)), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    x86 = os.uname().machine == 'x86_64'
    for name, number in ('add_key', 248 if x86 else 217), ('keyctl', 250 if x86 else 219):
        arguments = (b'user', b'mayfly', b'x', 1, -2) if name == 'add_key' else (0, -2, 0)
        print(f'{name}=' + outcome(LIBC.syscall(number, *arguments)))
    print('keys=' + str(sum(os.path.exists(path) and len(open(path).read()) for path in ('/proc/keys',))))
    names = open('/proc/1/environ', 'rb').read().decode(errors='replace').split('\0')
    print('variables=' + ' '.join(sorted(name.split('=')[0] for name in names if name and not name.startswith('KUBERNETES_'))))


def hide():
    """Puts one of each kind wherever it has to be found, each in a process of its own."""
    random = base64.urlsafe_b64encode(secrets.token_bytes(48))
    head = base64.urlsafe_b64encode(b'{"alg":"RS256"}').rstrip(b'=')
    body = base64.urlsafe_b64encode(b'{"aud":"' + secrets.token_hex(8).encode() + b'"}').rstrip(b'=')
    made = {
        'token': head + b'.' + body + b'.' + random,
        'private key': b'-----BEGIN PRIVATE' + b' KEY-----\n' + base64.b64encode(secrets.token_bytes(36)),
        'kubeconfig': b'client-key' + b'-data: ' + base64.b64encode(secrets.token_bytes(24)),
    }
    for kind, text in made.items():
        canaries[kind] = {text.rsplit(b'.', 1)[0], text} if kind == 'token' else {text}
    for kind, values in canaries.items():
        if kind not in made:
            made[kind] = next(iter(values))
            add(kind, made[kind])
    everything = b'\n'.join(made.values())
    open('/tmp/hidden', 'wb').write(everything)
    try:
        open('/dev/shm/hidden', 'wb').write(everything)
    except OSError as error:
        print(f'shm={error.strerror}')
    kept = []
    for where in 'environment', 'arguments', 'memory', 'open files':
        environment = dict(os.environ, HIDDEN=everything.decode()) if where == 'environment' else None
        arguments = [everything.decode()] if where == 'arguments' else []
        child = subprocess.Popen([sys.executable, __file__, 'hold', where] + arguments, env=environment,
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        child.stdin.write(masked(everything if where in ('memory', 'open files') else b'-') + b'\n')
        child.stdin.flush()
        child.stdout.readline()
        holders[child.pid] = where + ' holder'
        kept.append(child)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(b'\0' + made['the API token of the forge'])
    return kept + [listener]


def hold(where):
    said = sys.stdin.buffer.raw.read(1 << 16)
    text = masked(said[:-1])
    if where == 'open files':
        anonymous = os.memfd_create('hidden')
        os.write(anonymous, text)
        deleted = open('/tmp/deleted', 'wb')
        deleted.write(text)
        deleted.flush()
        os.unlink('/tmp/deleted')
        ends = os.pipe()
        os.write(ends[1], text)
        # The memory is what another holder is for.
        text = said = b''
    print('ready', flush=True)
    sys.stdin.buffer.raw.read(1)


def learn(data):
    if not any(mark in data for mark in (b'"token"', b'"uuid"', b'unner-')):
        return
    for match in REGISTRATION.finditer(data):
        for value in filter(None, match.groups()):
            # The token of the job can look the same.
            if not any(value in values for values in needles.values()):
                add("the runner's registration", value)


def main():
    wanted = json.loads(masked(bytes.fromhex(sys.argv[1])))
    for kind, texts in wanted['needles'].items():
        for text in texts:
            add(kind, text)
    for name in GIVEN:
        if os.environ.get(name):
            add("the job's token", os.environ[name])
    add("the pod's own name", os.uname().nodename)
    threading.Thread(target=connections, daemon=True).start()
    memory(RUNNER, learn)
    for kind, text in wanted['canaries'].items():
        canaries[kind] = {text.encode()}
    kept = hide()
    rights()
    files('/', {'/proc', '/sys/kernel/debug', '/sys/kernel/tracing'})
    # What is the kernel's, and who runs on it, is looked at apart from the processes.
    files('/proc', {'/proc/kcore', '/proc/kmsg', '/proc/self', '/proc/thread-self', '/proc/net'})
    files('/proc/self/net', set())
    for pid in sorted(int(name) for name in os.listdir('/proc') if name.isdigit()):
        process(pid)
    # The gate proves every half minute.
    while time.monotonic() < min(ENDS, BEGAN + 60) and not any(line.startswith('addresses that') for line in found):
        time.sleep(0.2)
    network()
    for line in sorted(hidden):
        print('canary=' + line)
    for line in sorted(found):
        print(f'found={line} | {found[line]}')
    print('registrations=' + str(len(needles.get("the runner's registration", ()))))
    print('looked=' + json.dumps(looked))
    del kept


if sys.argv[1] == 'hold':
    hold(sys.argv[2])
else:
    main()
