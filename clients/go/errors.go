package dnd

import (
	"context"
	"fmt"
	"math/rand"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Error is a call, or a job, that failed.
type Error struct {
	Code codes.Code
	// Message says what was wrong, and what would be right.
	Message string
	// Reason is the stable word that docs/errors.md explains; empty if it was no service of the mesh that answered.
	Reason string
	// Field is the field of the request that can't be right, such as "layers[0].units"; empty if it is none.
	Field string
	// RetryAfter is when the same call is worth another try; nil if the mesh does not say.
	RetryAfter *time.Duration
}

// ErrorOf reads what a call of a generated client returned.
func ErrorOf(err error) *Error {
	failed := status.Convert(err)
	e := &Error{Code: failed.Code(), Message: failed.Message()}
	for _, detail := range failed.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			e.Reason = detail.GetReason()
		case *errdetails.BadRequest:
			if violations := detail.GetFieldViolations(); len(violations) > 0 {
				e.Field = violations[0].GetField()
			}
		case *errdetails.RetryInfo:
			delay := detail.GetRetryDelay().AsDuration()
			e.RetryAfter = &delay
		}
	}
	return e
}

func (e *Error) Error() string {
	text := e.Reason
	if text == "" {
		text = e.Code.String()
	}
	text += ": " + e.Message
	if e.Field != "" {
		text += fmt.Sprintf(" (field %s)", e.Field)
	}
	if e.RetryAfter != nil {
		text += fmt.Sprintf(" (worth another try in %s)", e.RetryAfter)
	}
	return text
}

// isAway tells whether the mesh was not there, or had no time, and the same call may go well later.
func (e *Error) isAway() bool {
	switch e.Code {
	case codes.Unavailable:
		return true
	case codes.ResourceExhausted:
		return e.RetryAfter != nil
	case codes.Unknown, codes.Internal:
		return e.Reason == ""
	}
	return false
}

// patience is how long a call waits for a mesh that is away: about a minute, after each answer anew.
type patience struct {
	tries int
	after time.Duration
}

func newPatience() patience { return patience{tries: 12, after: 250 * time.Millisecond} }

// wait comes back when there is to be another try, else with why not.
func (p *patience) wait(ctx context.Context, err error) error {
	e := ErrorOf(err)
	if ctx.Err() != nil || !e.isAway() || p.tries == 0 {
		return e
	}
	p.tries--
	delay := p.after
	if asked := e.RetryAfter; asked != nil && *asked > delay {
		delay = *asked
		if delay > time.Minute {
			delay = time.Minute
		}
	}
	if p.after *= 2; p.after > 8*time.Second {
		p.after = 8 * time.Second
	}
	// No two callers wait equally long, so that they do not come back as one.
	timer := time.NewTimer(delay + time.Duration(rand.Int63n(int64(delay/2)+1)))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return e
	}
}

// retried makes a call, and makes it again while the mesh is away. What is asked here may be asked twice.
func retried(ctx context.Context, call func() error) error {
	patience := newPatience()
	for {
		err := call()
		if err == nil {
			return nil
		}
		if err := patience.wait(ctx, err); err != nil {
			return err
		}
	}
}
