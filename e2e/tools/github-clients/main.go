// Program github-clients drives a GitHub with github.com/actions/scaleset, GitHub's own client and listener for runner scale sets, and
// prints what it saw as one JSON object. It knows nothing of the simulator: whatever it meets must look like GitHub to it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"sync"
	"time"

	"github.com/actions/scaleset"
	"github.com/actions/scaleset/listener"
)

type settings struct {
	configURL, token, clientID, keyFile, set, group, label, proxy string
	installation                                                  int64
	jobs, max                                                     int
	patience                                                      time.Duration
}

// What was seen, for the test that started this program.
type story struct {
	ScaleSetID       int               `json:"scaleSetId"`
	GroupID          int               `json:"groupId"`
	Labels           []string          `json:"labels"`
	Duplicate        string            `json:"duplicate"`
	Conflict         string            `json:"conflict"`
	JitDuplicate     string            `json:"jitDuplicate"`
	BusyRemoval      string            `json:"busyRemoval"`
	GoneRunner       string            `json:"goneRunner"`
	Started          []string          `json:"started"`
	Completed        map[string]string `json:"completed"`
	RequestIDs       []int64           `json:"requestIds"`
	MostDesired      int               `json:"mostDesired"`
	RunnerFound      bool              `json:"runnerFound"`
	Refreshed        bool              `json:"refreshed"`
	AssignedOpening  int               `json:"assignedOpening"`
	DeletedAfterward bool              `json:"deletedAfterward"`
}

func main() {
	var s settings
	flag.StringVar(&s.configURL, "url", "", "organization, repository or enterprise")
	flag.StringVar(&s.token, "token", "", "personal access token")
	flag.StringVar(&s.clientID, "client-id", "", "client id of a GitHub App")
	flag.Int64Var(&s.installation, "installation", 0, "installation of the App")
	flag.StringVar(&s.keyFile, "key", "", "file with the App's private key")
	flag.StringVar(&s.set, "set", "linux", "name of the scale set")
	flag.StringVar(&s.label, "label", "", "one more label")
	flag.StringVar(&s.group, "group", scaleset.DefaultRunnerGroup, "runner group")
	flag.StringVar(&s.proxy, "proxy", "", "HTTP proxy")
	flag.IntVar(&s.jobs, "jobs", 1, "jobs to wait for")
	flag.IntVar(&s.max, "max", 2, "most runners at once")
	flag.DurationVar(&s.patience, "patience", time.Minute, "longest time")
	flag.Parse()
	seen, err := run(s)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	_ = json.NewEncoder(os.Stdout).Encode(seen)
}

func run(s settings) (*story, error) {
	ctx, cancel := context.WithTimeout(context.Background(), s.patience)
	defer cancel()
	client, err := connect(s)
	if err != nil {
		return nil, err
	}
	seen := &story{Completed: map[string]string{}}
	group, err := client.GetRunnerGroupByName(ctx, s.group)
	if err != nil {
		return nil, fmt.Errorf("runner group: %w", err)
	}
	seen.GroupID = group.ID
	if found, err := client.GetRunnerScaleSet(ctx, group.ID, s.set); err != nil || found != nil {
		return nil, fmt.Errorf("the scale set should not be there yet: %v %w", found, err)
	}
	wanted := &scaleset.RunnerScaleSet{Name: s.set, RunnerGroupID: group.ID, RunnerSetting: scaleset.RunnerSetting{DisableUpdate: true}}
	wanted.Labels = []scaleset.Label{{Name: s.set}}
	if s.label != "" {
		wanted.Labels = append(wanted.Labels, scaleset.Label{Name: s.label})
	}
	set, err := client.CreateRunnerScaleSet(ctx, wanted)
	if err != nil {
		return nil, fmt.Errorf("create: %w", err)
	}
	seen.ScaleSetID = set.ID
	_, err = client.CreateRunnerScaleSet(ctx, wanted)
	seen.Duplicate = text(err)
	set.RunnerSetting.DisableUpdate = true
	if set, err = client.UpdateRunnerScaleSet(ctx, set.ID, set); err != nil {
		return nil, fmt.Errorf("update: %w", err)
	}
	if set, err = client.GetRunnerScaleSetByID(ctx, set.ID); err != nil || !set.RunnerSetting.DisableUpdate {
		return nil, fmt.Errorf("get: %v %w", set, err)
	}
	for _, label := range set.Labels {
		seen.Labels = append(seen.Labels, label.Name)
	}

	session, err := client.MessageSessionClient(ctx, set.ID, "first")
	if err != nil {
		return nil, fmt.Errorf("session: %w", err)
	}
	seen.AssignedOpening = session.Session().Statistics.TotalAssignedJobs
	_, err = client.MessageSessionClient(ctx, set.ID, "second", scaleset.WithRetryMax(0))
	seen.Conflict = text(err)

	listening, stop := context.WithCancel(ctx)
	scaler := &scaler{client: client, set: set.ID, seen: seen, jobs: s.jobs, stop: stop, runners: map[string]int{}, session: session}
	l, err := listener.New(&recording{session, seen}, listener.Config{ScaleSetID: set.ID, MaxRunners: s.max})
	if err != nil {
		return nil, err
	}
	if err := l.Run(listening, scaler); !errors.Is(err, context.Canceled) || ctx.Err() != nil {
		return nil, fmt.Errorf("listener: %w (seen so far: %+v)", err, seen)
	}
	scaler.waiting.Wait()
	if scaler.failure != nil {
		return nil, scaler.failure
	}
	if err := session.Close(ctx); err != nil {
		return nil, fmt.Errorf("session close: %w", err)
	}
	if err := client.DeleteRunnerScaleSet(ctx, set.ID); err != nil {
		return nil, fmt.Errorf("delete: %w", err)
	}
	_, err = client.GetRunnerScaleSetByID(ctx, set.ID)
	seen.DeletedAfterward = err != nil
	return seen, nil
}

func connect(s settings) (*scaleset.Client, error) {
	system := scaleset.SystemInfo{System: "mayfly-e2e", Subsystem: "github-clients"}
	options := []scaleset.HTTPOption{scaleset.WithRetryMax(2), scaleset.WithRetryWaitMax(2 * time.Second)}
	if s.proxy != "" {
		proxy, err := url.Parse(s.proxy)
		if err != nil {
			return nil, err
		}
		options = append(options, scaleset.WithProxy(func(*http.Request) (*url.URL, error) { return proxy, nil }))
	}
	if s.token != "" {
		return scaleset.NewClientWithPersonalAccessToken(scaleset.NewClientWithPersonalAccessTokenConfig{
			GitHubConfigURL: s.configURL, PersonalAccessToken: s.token, SystemInfo: system,
		}, options...)
	}
	key, err := os.ReadFile(s.keyFile)
	if err != nil {
		return nil, err
	}
	return scaleset.NewClientWithGitHubApp(scaleset.ClientWithGitHubAppConfig{
		GitHubConfigURL: s.configURL,
		GitHubAppAuth:   scaleset.GitHubAppAuth{ClientID: s.clientID, InstallationID: s.installation, PrivateKey: string(key)},
		SystemInfo:      system,
	}, options...)
}

// Notes what goes through the listener's client.
type recording struct {
	*scaleset.MessageSessionClient
	seen *story
}

func (r *recording) GetMessage(ctx context.Context, last, capacity int) (*scaleset.RunnerScaleSetMessage, error) {
	before := r.Session().MessageQueueAccessToken
	message, err := r.MessageSessionClient.GetMessage(ctx, last, capacity)
	if r.Session().MessageQueueAccessToken != before {
		r.seen.Refreshed = true
	}
	return message, err
}

func (r *recording) AcquireJobs(ctx context.Context, ids []int64) ([]int64, error) {
	won, err := r.MessageSessionClient.AcquireJobs(ctx, ids)
	r.seen.RequestIDs = append(r.seen.RequestIDs, won...)
	return won, err
}

// Makes a runner for every job that wants one. The runners themselves are the test's: it finds their configurations on standard output.
type scaler struct {
	client  *scaleset.Client
	session *scaleset.MessageSessionClient
	set     int
	jobs    int
	made    int
	done    int
	runners map[string]int
	seen    *story
	stop    context.CancelFunc
	waiting sync.WaitGroup
	failure error
}

func (s *scaler) HandleDesiredRunnerCount(ctx context.Context, count int) (int, error) {
	s.seen.MostDesired = max(s.seen.MostDesired, count)
	for s.made-s.done < count {
		s.made++
		name := fmt.Sprintf("runner-%d-%d", s.set, s.made)
		made, err := s.client.GenerateJitRunnerConfig(ctx, &scaleset.RunnerScaleSetJitRunnerSetting{Name: name, WorkFolder: "_work"}, s.set)
		if err != nil {
			return 0, fmt.Errorf("jit: %w", err)
		}
		if s.made == 1 {
			_, err := s.client.GenerateJitRunnerConfig(ctx, &scaleset.RunnerScaleSetJitRunnerSetting{Name: name}, s.set)
			s.seen.JitDuplicate = kind(err)
			byName, err := s.client.GetRunnerByName(ctx, name)
			s.seen.RunnerFound = err == nil && byName != nil && byName.ID == made.Runner.ID && byName.RunnerScaleSetID == s.set
		}
		s.runners[name] = made.Runner.ID
		_ = json.NewEncoder(os.Stdout).Encode(map[string]any{"jit": made.EncodedJITConfig, "name": name})
	}
	return count, nil
}

func (s *scaler) HandleJobStarted(ctx context.Context, job *scaleset.JobStarted) error {
	s.seen.Started = append(s.seen.Started, job.RunnerName)
	if s.runners[job.RunnerName] != job.RunnerID {
		s.failure = fmt.Errorf("job started on %s (%d), which is not ours", job.RunnerName, job.RunnerID)
	}
	if len(s.seen.Started) == 1 {
		s.seen.BusyRemoval = kind(s.client.RemoveRunner(ctx, int64(job.RunnerID)))
	}
	return nil
}

func (s *scaler) HandleJobCompleted(ctx context.Context, job *scaleset.JobCompleted) error {
	s.done++
	s.seen.Completed[job.JobDisplayName] = job.Result
	_, err := s.client.GetRunner(ctx, job.RunnerID)
	s.seen.GoneRunner = kind(err)
	if s.done == s.jobs {
		s.stop()
	}
	return nil
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// What the client made of an error.
func kind(err error) string {
	switch {
	case err == nil:
		return "none"
	case errors.Is(err, scaleset.RunnerExistsError):
		return "RunnerExists"
	case errors.Is(err, scaleset.RunnerNotFoundError):
		return "RunnerNotFound"
	case errors.Is(err, scaleset.JobStillRunningError):
		return "JobStillRunning"
	default:
		return err.Error()
	}
}
