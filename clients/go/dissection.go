package dnd

import (
	"errors"

	"dnd.example/go/dndv1"
	"google.golang.org/grpc/codes"
)

// Dissection is the labelled units of a job.
type Dissection struct {
	// JobID is the job's id: with it Client.Follow finds all this again.
	JobID string
	// Accepted is what the job worked on, and what its results depend on.
	Accepted *dndv1.JobAccepted
	// Done is how it ended.
	Done *dndv1.JobDone
	// Skipped has the pictures that could not be used, and why, by path.
	Skipped map[string]string

	lastEvent uint64
	units     map[at]*dndv1.UnitResult
}

type at struct {
	layer string
	unit  uint32
}

// errEnded says that there is nothing more to come.
var errEnded = errors.New("the job has ended")

func newDissection(job *dndv1.Job) *Dissection {
	return &Dissection{JobID: job.GetJobId(), lastEvent: job.GetLastEvent(), Skipped: map[string]string{}, units: map[at]*dndv1.UnitResult{}}
}

// take takes what happened in the job. It gives errEnded at its end, and an *Error if it waits for someone to resume it.
func (d *Dissection) take(event *dndv1.JobEvent) error {
	// What came before the job was resumed last is its past.
	isPast := event.GetNumber() < d.lastEvent
	switch event := event.GetEvent().(type) {
	case *dndv1.JobEvent_Accepted:
		d.Accepted = event.Accepted
	case *dndv1.JobEvent_Skipped:
		d.Skipped[event.Skipped.GetPath()] = event.Skipped.GetReason()
	case *dndv1.JobEvent_Unit:
		d.units[at{event.Unit.GetLayer(), event.Unit.GetUnit()}] = event.Unit
	case *dndv1.JobEvent_Paused:
		if !event.Paused.GetByItself() && !isPast {
			return &Error{Code: codes.FailedPrecondition, Message: event.Paused.GetMessage(), Reason: event.Paused.GetReason()}
		}
	case *dndv1.JobEvent_Done:
		if !isPast {
			d.Done = event.Done
			return errEnded
		}
	}
	return nil
}

// Units gives the units that have ended, in the order that was asked for.
func (d *Dissection) Units() []*dndv1.UnitResult {
	var units []*dndv1.UnitResult
	for _, layer := range d.Accepted.GetLayers() {
		for _, number := range layer.GetUnits() {
			if unit := d.Unit(layer.GetLayer(), number); unit != nil {
				units = append(units, unit)
			}
		}
	}
	return units
}

// Unit gives the unit of a layer and a number, nil if it has not ended.
func (d *Dissection) Unit(layer string, unit uint32) *dndv1.UnitResult {
	return d.units[at{layer, unit}]
}
